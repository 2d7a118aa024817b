"""Products of any shape, by programs of few."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rece.losses import build_loss
from hf_rece.ops import products
from hf_rece.ops.products import product, recurring


@given(st.integers(1, 1000))
def test_a_size_grows_by_less_than_itself(n):
    assert n <= recurring(n) < 2 * n + (n == 1)
    assert recurring(n) < n + 64
    assert recurring(recurring(n)) == recurring(n)


def test_few_sizes_stand_for_many():
    assert len({recurring(n) for n in range(1, 257)}) <= 10


@given(st.integers(0, 130), st.integers(0, 130), st.integers(1, 9))
def test_a_product_is_that_of_torch(n, m, k):
    left, right = torch.randn(n, k), torch.randn(m, k)
    found = product(left, right)
    torch.testing.assert_close(found, left @ right.T)
    assert found.is_contiguous()


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
def test_the_library_meets_recurring_shapes_alone():
    shapes = []

    def spy(left, right, *_):
        shapes.append((len(left), len(right)))
        return left @ right.T

    with patch.object(products.torch.ops.mkldnn, "_linear_pointwise", spy):
        for n in (1, 3, 63, 65, 200):
            for m in (1, 63, 100):
                found = product(torch.ones(n, 2), torch.ones(m, 2))
                assert found.shape == (n, m)
                assert found.is_contiguous()
    assert all((recurring(n), recurring(m)) == (n, m) for n, m in shapes)
    assert len(shapes) == 15


def test_a_large_result_is_not_copied(monkeypatch):
    monkeypatch.setattr(products, "_COPIED", 100)
    shapes = []
    monkeypatch.setattr(products, "_onednn_serves", lambda *_: True)
    monkeypatch.setattr(
        products.torch.ops.mkldnn,
        "_linear_pointwise",
        lambda left, right, *_: shapes.append((len(left), len(right))) or left @ right.T,
        raising=False,
    )
    found = product(torch.ones(3, 2), torch.ones(63, 2))
    assert shapes == [(4, 63)]
    assert found.shape == (3, 63)
    assert found.untyped_storage().nbytes() == 4 * 4 * 63


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_added_up_in_float32(dtype):
    left, right = torch.randn(3, 40, 300).to(dtype), torch.randn(3, 50, 300).to(dtype)
    exact = left.double() @ right.double().transpose(1, 2)
    found = [
        products.batched_product(left, right),
        products.batched_transposed_product(left.transpose(1, 2), right.transpose(1, 2)),
        product(left[0], right[0]).expand(3, -1, -1),
    ]
    assert {values.dtype for values in found} == {torch.float32}
    for values, wanted in zip(found, (exact, exact, exact[:1].expand(3, -1, -1)), strict=True):
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-4)


def test_a_search_is_rounded_on_a_gpu_as_its_inputs_are(monkeypatch):
    half, single = torch.ones(1, dtype=torch.bfloat16), torch.ones(1)
    assert products.search_dtype(half, [half]) is None
    monkeypatch.setattr(products, "_ROUNDING_DEVICES", ("cpu",))
    assert products.search_dtype(half, [half]) == torch.bfloat16
    assert products.search_dtype(half, [single]) is None
    assert products.search_dtype(half.half(), [half.half()]) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.search_dtype(single, [single]) == torch.bfloat16
        assert products.search_dtype(single.double(), [half]) is None


@pytest.mark.parametrize("name", ["rece", "sce", "stratified"])
def test_plans_search_in_half_precision_on_a_gpu(name, monkeypatch):
    hidden, weight = torch.randn(60, 16), torch.randn(300, 16)
    labels = torch.randint(300, (60,))
    multiply, seen = products._product_of_halves, []
    monkeypatch.setattr(products, "_ROUNDING_DEVICES", ("cpu",))
    monkeypatch.setattr(
        products, "_product_of_halves", lambda *of: (seen.append(of[0].dtype), multiply(*of))[1]
    )
    half = hidden.bfloat16(), weight.bfloat16()
    found = build_loss(name, backend="torch")(*half, labels, generator=torch.Generator())
    assert set(seen) == {torch.bfloat16}
    assert torch.isfinite(found)
