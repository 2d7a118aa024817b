"""Products of any shape, by programs of few."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
