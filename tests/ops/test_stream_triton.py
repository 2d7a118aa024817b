"""The Triton kernels against the torch backend, in Triton's interpreter; on a GPU with -m gpu."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.errors import ArgumentError
from hf_rece.losses import LOSSES, build_loss
from hf_rece.ops import fallback, products, stream, stream_torch
from hf_rece.ops.plan import Grid, Plan
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.stream import choose_kernel
from hf_rece.ops.stream_torch import Gradients, Scores
from tests.ops.every_kernel import (
    KNOBS,
    SHAPING,
    TOLERANCE,
    assert_same,
    compare,
    draw_case,
    loss_and_grads,
    run,
    tensors_of,
)

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.errors import OutOfResources

from hf_rece.ops import stream_triton, triton_windows

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not stream_triton.is_interpreted(), reason="set TRITON_INTERPRET=1 to run without a GPU"
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ],
    ),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)


# ------------------------------------------------------------------------------------ whole losses


def test_every_loss_is_here():
    assert KNOBS.keys() == LOSSES.keys()


@on_every_device
@pytest.mark.parametrize("shaping", [{}, SHAPING], ids=["plain", "shaped"])
@pytest.mark.parametrize("name", KNOBS)
def test_losses_equal_those_of_the_torch_backend(name, shaping, device):
    hidden, weight, labels, bias = tensors_of(device)
    assert_same(name, "triton", hidden, weight, labels, bias if shaping else None, **shaping)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "width"), [("cross_entropy", 20), ("sce", 20), ("bce", 20), ("cross_entropy", 300)]
)
def test_low_precision_is_accumulated_in_float32(name, width, dtype, device):
    tensors = tensors_of(device, width=width, dtype=dtype)
    scale = min(1.0, 4 / width**0.5)
    plain, fused = (
        loss_and_grads(name, backend, *tensors, logit_scale=scale)
        for backend in ("torch", "triton")
    )
    # Products of the inputs as they are: the losses are those of float32 arithmetic.
    torch.testing.assert_close(fused[0], plain[0], **TOLERANCE)
    for left, right in zip(fused[3:], plain[3:], strict=True):
        assert left.dtype == dtype
        # Gradients of logits are rounded to the inputs' dtype: an error of eps of their sizes.
        error = (left.float() - right.float()).norm() / right.float().norm()
        assert error < 2 * torch.finfo(dtype).eps


@on_every_device
def test_shares_too_small_for_float16_still_count(device):
    # 4096 classes that share evenly, of tokens whose gradients are small: 2**-12 * 2**-16.
    hidden = torch.zeros(4, 16, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(4096, 16, device=device, dtype=torch.float16, requires_grad=True)
    losses = build_loss("cross_entropy")(
        hidden, weight, torch.arange(4, device=device), backend="triton", reduction="none"
    )
    (grad,) = torch.autograd.grad(losses.sum() * 2**-3, hidden)
    # Shares add up to one, and the label takes one away.
    assert grad.abs().max() < 2**-12
    known = Gradients(torch.zeros(4, 16, device=device), None, None)
    grid = Grid(torch.arange(4, device=device, dtype=torch.int32).view(1, -1), None)
    plan = Plan((grid,), "logaddexp", 4, 4096, 2**20)
    scores = Scores(hidden.detach(), DenseRows(weight.detach()), None, 1.0, None)
    merged, winner, _ = stream_triton.forward(scores, plan)
    small = torch.full((5,), 2.0**-16, device=device)
    small[4] = 0
    stream_triton.backward(scores, plan, merged, winner, small, known)
    torch.testing.assert_close(
        known.hidden, torch.full_like(known.hidden, 2.0**-16), rtol=1e-3, atol=0
    )


@on_every_device
def test_inputs_of_two_dtypes_are_multiplied_in_float32(device):
    hidden, weight, labels, bias = tensors_of(device)
    hidden = hidden.detach().bfloat16().requires_grad_()
    plain, fused = (
        loss_and_grads("cross_entropy", backend, hidden, weight, labels, bias)
        for backend in ("torch", "triton")
    )
    for left, right in zip(fused, plain, strict=True):
        torch.testing.assert_close(left, right, **TOLERANCE)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [20, 300])
def test_autocast_rounds_operands_alone(width, dtype, device, monkeypatch):
    monkeypatch.setattr(products, "_ROUNDING_DEVICES", (device,))
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies in float32 what would be bfloat16")
    hidden, weight, labels, bias = tensors_of(device, width=width)
    scale = {"logit_scale": 0.3, "observe": False}

    def found(backend, operands, autocast):
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            return loss_and_grads("cross_entropy", backend, *operands, labels, bias, **scale)

    rounded = [t.detach().to(dtype).float().requires_grad_() for t in (hidden, weight)]
    exact = found("torch", rounded, False)
    for backend in ("torch", "triton"):
        cast = found(backend, (hidden, weight), True)
        torch.testing.assert_close(cast[0], exact[0], **TOLERANCE)
        for left, right in zip(cast[1:], exact[1:], strict=True):
            assert left.dtype == torch.float32
            error = (left - right).norm() / right.norm()
            assert error < 2 * torch.finfo(dtype).eps
        assert not torch.equal(cast[0], found(backend, (hidden, weight), False)[0])


# ------------------------------------------------------------------------------------------ shapes


@on_every_device
@pytest.mark.parametrize(
    ("name", "n_tokens", "n_classes", "width"),
    [
        ("cross_entropy", 4, 150, 1),
        ("cross_entropy", 40, 141, 300),
        ("cross_entropy", 4, 2100, 16),
        ("stratified", 4, 150, 1),
        ("stratified", 12, 141, 260),
        ("rece", 16, 150, 100),
        ("cross_entropy", 4, 141, 5000),
    ],
)
def test_any_shape(name, n_tokens, n_classes, width, device):
    hidden, weight, labels, bias = tensors_of(device, n_tokens, n_classes, width)
    labels[0, 0] = 11  # so that not all of few tokens are ignored
    scale = min(1.0, 4 / width**0.5)
    assert_same(name, "triton", hidden, weight, labels, bias, logit_scale=scale)


@on_every_device
@pytest.mark.parametrize("name", KNOBS)
def test_all_tokens_ignored(name, device):
    hidden, weight, labels, bias = tensors_of(device, n_tokens=8)
    assert_same(name, "triton", hidden, weight, torch.full_like(labels, -100), bias)


@on_every_device
def test_layouts_are_free(device):
    hidden, weight, labels, bias = tensors_of(device)
    hidden = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    spread = torch.cat([weight.detach(), weight.detach()], 1)[:, :20].requires_grad_()
    for rows in (turned, spread):
        for name in ("cross_entropy", "sce"):
            assert_same(name, "triton", hidden, rows, labels, bias)


@on_every_device
@pytest.mark.parametrize(
    ("frozen", "width"), [("hidden", 20), ("weight", 20), ("bias", 140), ("weight", 140)]
)
def test_frozen_inputs(frozen, width, device):
    names = ("hidden", "weight", "labels", "bias")
    tensors = dict(zip(names, tensors_of(device, width=width), strict=True))
    tensors[frozen] = tensors[frozen].detach()
    assert_same("sampled_softmax", "triton", *tensors.values(), logit_scale=0.3)


@on_every_device
@pytest.mark.skipif(
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 12 * 2**30,
    reason="some systems promise no more memory than there is",
)
@pytest.mark.parametrize("width", [16, 300])
def test_numbers_beyond_32_bits_are_addressed(width, device):
    # Of these 9 GB, a CPU touches a few pages.
    stride = 2**30 + 16
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("a GPU keeps what it promises")
    spread = torch.empty(2 * stride + width, dtype=torch.float32, device=device)
    far = spread.as_strided((3, width), (stride, 1))
    near = torch.randn(3, width, device=device)
    far.copy_(near)
    tokens, classes = (torch.tensor([[0, 2, 1]], dtype=torch.int32, device=device) for _ in "ab")
    grad = torch.tensor([1.0, 0.5, -1.0, 0.0], device=device)
    for sole in (None, classes):  # all classes in order, or gathered
        plan = Plan((Grid(tokens, sole),), "logaddexp", 3, 3, 2**20)
        found, wanted = (
            run(
                stream_triton,
                Scores(vectors, DenseRows(vectors), None, 0.1, None),
                plan,
                grad,
                3 * (True,),
            )
            for vectors in (far, near)
        )
        compare(wanted, found, plan.merge)


# ---------------------------------------------------------------------------------------- any plan


@on_every_device
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_plan(device, data):
    scores, plan, grad, wants = draw_case(data.draw, device)
    plain = run(stream_torch, scores, plan, grad, wants)
    compare(plain, run(stream_triton, scores, plan, grad, wants), plan.merge)


@on_every_device
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_deterministic_run_adds_by_no_atomics(device, data):
    scores, plan, grad, wants = draw_case(data.draw, device)
    plain = run(stream_torch, scores, plan, grad, wants)
    with pytest.MonkeyPatch.context() as patch:
        launched = []
        for name in ("hidden_kernel", "rows_kernel", "wide_kernel"):
            patch.setattr(stream_triton, name, _Noting(getattr(stream_triton, name), launched))
        torch.use_deterministic_algorithms(True)
        try:
            fused = run(stream_triton, scores, plan, grad, wants)
        finally:
            torch.use_deterministic_algorithms(False)
    compare(plain, fused, plan.merge)
    # wide_kernel adds by nothing else.
    assert not any(constants.get("ATOMIC", True) for constants in launched)


class _Noting:
    """A kernel whose launches are noted."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launched.append(constants)
            return self.kernel[grid](*args, **constants)

        return launch


@on_every_device
@pytest.mark.parametrize("name", ["cross_entropy", "rece", "stratified"])
def test_one_skip_a_token_is_found_without_a_sort(name, device, monkeypatch):
    make, compared = triton_windows._skip_table, []

    def both(grid, *shape):
        found = make(grid, *shape)
        if grid.skips_once and found is not None:
            compared.append(torch.equal(found, make(replace(grid, skips_once=False), *shape)))
        return found

    monkeypatch.setattr(triton_windows, "_skip_table", both)
    loss_and_grads(name, "triton", *tensors_of(device))
    assert compared
    assert all(compared)


@on_every_device
def test_of_groups_with_equal_values_one_alone_has_the_gradient(device):
    tokens = torch.zeros((2, 1), dtype=torch.int32, device=device)
    classes = torch.zeros((2, 1), dtype=torch.int32, device=device)
    plan = Plan((Grid(tokens, classes), Grid(tokens, classes)), "maximum", 1, 2, 2**20)
    scores = Scores(
        torch.ones(1, 4, device=device), DenseRows(torch.ones(2, 4, device=device)), None, 1.0, None
    )
    grad = torch.tensor([1.0, 0.0], device=device)
    _, (hidden, weight, _), winner = run(stream_triton, scores, plan, grad, (True, True, True))
    assert winner[0] == 3
    assert torch.equal(hidden, torch.ones_like(hidden))
    assert weight.sum() == 4


@on_every_device
def test_walks_are_split_where_programs_are_few(device, monkeypatch):
    monkeypatch.setattr(triton_windows, "_BLOCKS_A_SPLIT", 1)
    monkeypatch.setattr(triton_windows, "_PROGRAMS_A_CORE", 64)
    hidden, weight, labels, bias = tensors_of(device, n_tokens=80, n_classes=600)
    for name in ("cross_entropy", "bce"):
        assert_same(name, "triton", hidden, weight, labels, bias)


# ------------------------------------------------------------------------------------- the choice


def test_float64_is_left_to_the_torch_backend():
    rows = DenseRows(torch.ones(3, 2, dtype=torch.float64))
    assert choose_kernel("triton", torch.ones(2, 2), rows) is stream_torch


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(stream_triton, "is_interpreted", lambda: False)
    with pytest.raises(ArgumentError, match=r"backend='triton'.*TRITON_INTERPRET=1"):
        choose_kernel("triton", torch.ones(2, 2), DenseRows(torch.ones(3, 2)))


def test_without_triton_the_torch_backend_serves_or_says_what_to_install(monkeypatch):
    monkeypatch.setattr(stream, "find_spec", lambda name: None)
    monkeypatch.setattr(stream, "_has_fast_gpu", lambda hidden: True)
    hidden, rows = torch.ones(2, 2, device="meta"), DenseRows(torch.ones(3, 2, device="meta"))
    assert choose_kernel("auto", hidden, rows) is stream_torch
    with pytest.raises(ArgumentError, match=r"Triton is not installed.*hf_rece\[triton\]"):
        choose_kernel("triton", hidden, rows)


def test_auto_takes_triton_where_a_gpu_is_served(monkeypatch):
    monkeypatch.setattr(stream, "_has_fast_gpu", lambda hidden: True)
    monkeypatch.setattr(stream_triton, "is_interpreted", lambda: True)
    monkeypatch.setattr(stream, "_native_kernel", lambda *_: pytest.fail("this is no CPU"))
    hidden = torch.ones(2, 2, device="meta")
    assert choose_kernel("auto", hidden, DenseRows(hidden)) is stream_triton


class _Refusing:
    """A kernel whose launches fail."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        raise self.error


@pytest.mark.parametrize("fails_in", ["forward", "rows"])
def test_what_does_not_compile_is_left_to_torch_once_and_for_all(fails_in, monkeypatch):
    refusal = OutOfResources(300_000, 232_448, "shared memory")
    hidden, weight, labels, bias = tensors_of("cpu", width=20)
    wanted = loss_and_grads("cross_entropy", "torch", hidden, weight, labels, bias)
    monkeypatch.setattr(fallback, "_refusals", [])
    monkeypatch.setattr(stream, "_has_fast_gpu", lambda hidden: True)
    monkeypatch.setattr(stream, "_native_kernel", lambda *_: stream_triton)
    monkeypatch.setattr(stream_triton, f"{fails_in}_kernel", _Refusing(refusal))
    with pytest.raises(OutOfResources):
        loss_and_grads("cross_entropy", "triton", hidden, weight, labels, bias)
    assert not fallback.is_refused()
    with pytest.warns(UserWarning, match=r"Triton refused a kernel.*shared memory") as said:
        found = loss_and_grads("cross_entropy", "auto", hidden, weight, labels, bias)
    assert len(said) == 1
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, **TOLERANCE)
    fast = torch.ones(2, 2, device="meta")
    assert choose_kernel("auto", fast, DenseRows(fast)) is stream_torch
    assert choose_kernel("triton", torch.ones(2, 2), DenseRows(weight)) is stream_triton
