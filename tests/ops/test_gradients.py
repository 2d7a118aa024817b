"""Gradients are added up in float32, in memory that their result takes anyway."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_rece.losses import build_loss
from hf_rece.ops import gradients, products, rows
from hf_rece.ops.gradients import window_edges
from hf_rece.ops.rows import narrowed
from tests.ops.every_kernel import KNOBS, SHAPING, loss_and_grads, tensors_of

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted")


class LiveBytes(TorchDispatchMode):
    """Notes the largest total of storages that were made inside and alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.before = {}, 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        found = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(found)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


def is_tensor(value):
    return isinstance(value, torch.Tensor)


@given(st.integers(1, 10**8), st.integers(0, 10**7), st.integers(1, 5000))
def test_the_sums_of_a_window_fit_behind_it(n_classes, n_lent, least):
    end = n_classes + n_lent
    edges = window_edges(0, n_classes, end, least)
    assert (edges[0], edges[-1]) == (0, n_classes)
    assert len(edges) <= 40
    for start, stop in pairwise(edges):
        assert start < stop
        # float32 sums take the room of two rows in half precision.
        assert end - stop >= 2 * (stop - start) or end - start <= max(least, 192)


@given(st.integers(0, 300), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_sums_are_rounded_where_they_lie(n, dtype):
    sums = torch.randn(n, 3)
    wanted, memory = sums.to(dtype), sums.untyped_storage().data_ptr()
    first, rows._FIRST_PIECE = rows._FIRST_PIECE, 5
    try:
        found = narrowed(sums, dtype)
    finally:
        rows._FIRST_PIECE = first
    assert torch.equal(found, wanted)
    assert found.dtype == dtype
    assert n == 0 or found.untyped_storage().data_ptr() == memory


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        pytest.param("triton", torch.float16, marks=interpreted),
    ],
)
@pytest.mark.parametrize("shaping", [{}, SHAPING], ids=["plain", "shaped"])
def test_windows_change_no_gradient(backend, dtype, shaping, monkeypatch):
    # Labels of 52 tokens lie in the first window; 531 rows lend two to each of 64 tokens.
    tensors = tensors_of("cpu", n_tokens=64, n_classes=531, dtype=dtype)
    tensors[2][0, 1:] = torch.randint(10, 531, (15,))
    tensors[2][0, -4:] = torch.tensor([530, 127, 128, 529])
    whole = loss_and_grads("cross_entropy", backend, *tensors, observe=False, **shaping)
    monkeypatch.setattr(gradients, "_WORTH_WINDOWS", 0)
    monkeypatch.setattr(gradients, "_own_room", lambda *_: 0)
    walked = []
    room = gradients._room
    monkeypatch.setattr(gradients, "_room", lambda r, w: (walked.append(w), room(r, w))[1])
    cut = loss_and_grads("cross_entropy", backend, *tensors, observe=False, **shaping)
    assert [w.stop for w in walked] == [128, 192, 256, 320, 384, 531]
    for left, right in zip(cut, whole, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(left.float(), right.float(), rtol=eps, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "torch") for name in KNOBS if name != "cross_entropy"),
        pytest.param("sce", "triton", marks=interpreted),
    ],
)
def test_windows_of_gathered_classes_change_no_gradient(name, backend, monkeypatch):
    tensors = tensors_of("cpu", n_tokens=64, n_classes=431, dtype=torch.float16)
    monkeypatch.setattr(products, "_ROUNDING_DEVICES", ("cpu",))
    whole = loss_and_grads(name, backend, *tensors, observe=False, **SHAPING)
    monkeypatch.setattr(gradients, "_WORTH_PASSES", 0)
    monkeypatch.setattr(gradients, "_PAIRS_A_CLASS", 1000)
    monkeypatch.setattr(gradients, "_own_room", lambda *_: 0)
    walked = []
    room = gradients._room
    monkeypatch.setattr(gradients, "_room", lambda r, w: (walked.append(w), room(r, w))[1])
    cut = loss_and_grads(name, backend, *tensors, observe=False, **SHAPING)
    assert [w.stop for w in walked] == [128, 192, 256, 431]
    for left, right in zip(cut, whole, strict=True):
        error = (left.float() - right.float()).norm()
        assert error <= 2 * torch.finfo(torch.float16).eps * right.float().norm()


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "sampled_softmax"])
def test_half_precision_gradients_take_little_beside_the_result(name, is_gpu, monkeypatch):
    n_tokens, n_classes, width, tile = 64, 40_000, 64, 2**18
    hidden = torch.randn(n_tokens, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(n_classes, width, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(n_classes, (n_tokens,))
    monkeypatch.setattr(gradients, "_WORTH_WINDOWS", 2**20)
    monkeypatch.setattr(gradients, "_OWN_ROOM", 2**16)
    if is_gpu:
        monkeypatch.setattr(gradients, "_WORTH_PASSES", 2**20)
        monkeypatch.setattr(products, "_ROUNDING_DEVICES", ("cpu",))
    loss = build_loss(name, tile_bytes=tile)(hidden, weight, labels)
    with LiveBytes() as live:
        torch.autograd.grad(loss, (hidden, weight))
    in_half = 2 * n_classes * width
    # All classes, or a GPU: the result alone. Else the sums, rounded in place.
    most = in_half if is_gpu or name == "cross_entropy" else 2 * in_half
    assert in_half < live.peak < most + 2 * n_tokens * width + 2**18 + 3 * tile
