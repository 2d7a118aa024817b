"""The Triton kernels against the torch backend, in Triton's interpreter; on a GPU with -m gpu."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.errors import ArgumentError
from hf_rece.losses import LOSSES, build_loss
from hf_rece.ops import stream, stream_torch
from hf_rece.ops.plan import EarlierRound, Grid, Plan
from hf_rece.ops.rows import DenseRows, add_rows
from hf_rece.ops.stream import TokenStatistics, choose_kernel
from hf_rece.ops.stream_torch import Gradients, Scores

pytest.importorskip("triton", reason="Triton is not installed")

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
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


# ------------------------------------------------------------------------------------ whole losses

KNOBS = {
    "cross_entropy": {},
    "rece": {"n_buckets": 4, "n_rounds": 3},
    "sce": {"n_buckets": 6, "bucket_size_x": 20, "bucket_size_y": 30},
    "stratified": {"n_groups": 5, "n_hard": 20, "n_random": 17},
    "sampled_softmax": {"n_negatives": 50, "shared_by": "sequence", "logq": True},
    "bce": {"n_negatives": 30},
    "gbce": {"n_negatives": 40, "shared_by": "sequence"},
}
SHAPING = {"logit_scale": 0.7, "logit_softcap": 5.0, "excluded_ids": [0, 7, 149]}


def test_every_loss_is_here():
    assert KNOBS.keys() == LOSSES.keys()


def tensors_of(device, n_tokens=48, n_classes=150, width=20, dtype=torch.float32):
    hidden = torch.randn(n_tokens, width)
    weight = torch.randn(n_classes, width)
    labels = torch.randint(10, 140, (4, n_tokens // 4))
    labels[:, ::5] = -100
    bias = torch.randn(n_classes)
    hidden, weight, bias = (
        t.to(device, dtype).requires_grad_() for t in (hidden.view(4, -1, width), weight, bias)
    )
    return hidden, weight, labels.to(device), bias


def loss_and_grads(name, backend, hidden, weight, labels, bias, **knobs):
    """Return losses (the labels' shape), statistics, and gradients."""
    generator = torch.Generator(labels.device).manual_seed(3)
    noted = TokenStatistics()
    losses = build_loss(name, **KNOBS[name], **knobs)(
        hidden, weight, labels, bias=bias, backend=backend, reduction="none",
        generator=generator, statistics=noted,
    )  # fmt: skip
    factor = torch.linspace(-1, 2, losses.numel(), device=losses.device).view_as(losses)
    wanted = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    grads = torch.autograd.grad((losses * factor).sum(), wanted)
    return [losses.detach(), noted.entropy, noted.is_top1, *grads]


def assert_same(name, *tensors, tolerance=TOLERANCE, **knobs):
    plain, fused = (loss_and_grads(name, b, *tensors, **knobs) for b in ("torch", "triton"))
    for left, right in zip(fused, plain, strict=True):
        torch.testing.assert_close(left, right, equal_nan=True, **tolerance)


@on_every_device
@pytest.mark.parametrize("shaping", [{}, SHAPING], ids=["plain", "shaped"])
@pytest.mark.parametrize("name", KNOBS)
def test_losses_equal_those_of_the_torch_backend(name, shaping, device):
    hidden, weight, labels, bias = tensors_of(device)
    assert_same(name, hidden, weight, labels, bias if shaping else None, **shaping)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cross_entropy", "sce", "bce"])
def test_low_precision_is_accumulated_in_float32(name, dtype, device):
    tensors = tensors_of(device, dtype=dtype)
    plain, fused = (loss_and_grads(name, backend, *tensors) for backend in ("torch", "triton"))
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
    ],
)
def test_any_shape(name, n_tokens, n_classes, width, device):
    hidden, weight, labels, bias = tensors_of(device, n_tokens, n_classes, width)
    labels[0, 0] = 11  # so that not all of few tokens are ignored
    scale = min(1.0, 4 / width**0.5)
    assert_same(name, hidden, weight, labels, bias, logit_scale=scale)


@on_every_device
@pytest.mark.parametrize("name", KNOBS)
def test_all_tokens_ignored(name, device):
    hidden, weight, labels, bias = tensors_of(device, n_tokens=8)
    assert_same(name, hidden, weight, torch.full_like(labels, -100), bias)


@on_every_device
def test_layouts_are_free(device):
    hidden, weight, labels, bias = tensors_of(device)
    hidden = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    spread = torch.cat([weight.detach(), weight.detach()], 1)[:, :20].requires_grad_()
    for rows in (turned, spread):
        for name in ("cross_entropy", "sce"):
            assert_same(name, hidden, rows, labels, bias)


@on_every_device
@pytest.mark.parametrize(
    ("frozen", "width"), [("hidden", 20), ("weight", 20), ("bias", 140), ("weight", 140)]
)
def test_frozen_inputs(frozen, width, device):
    names = ("hidden", "weight", "labels", "bias")
    tensors = dict(zip(names, tensors_of(device, width=width), strict=True))
    tensors[frozen] = tensors[frozen].detach()
    assert_same("sampled_softmax", *tensors.values(), logit_scale=0.3)


# ---------------------------------------------------------------------------------------- any plan


@dataclass(frozen=True)
class HalvedRows:
    """Rows that are made, not stored: weight / 2."""

    weight: torch.Tensor

    n_rows = property(lambda self: len(self.weight))
    width = property(lambda self: self.weight.shape[1])

    def tensors(self):
        return (self.weight,)

    def rows(self, ids):
        return self.weight[ids] / 2

    def add_grad(self, grads, ids, grad):
        (buffer,) = grads
        if isinstance(ids, slice):
            buffer[ids] += grad / 2
        else:
            add_rows(buffer, ids, grad / 2)


def draw_grid(draw, generator, n_tokens, n_classes, sole):
    def randint(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    def flag():
        return draw(st.booleans())

    everything = sole and flag()
    n_groups = 1 if everything else draw(st.integers(1, 4))
    n = draw(st.integers(1, 40))
    m = n_classes if everything else draw(st.integers(1, 50))
    # With padding at any place, and tokens that occur several times.
    tokens = randint(0, n_tokens + 1, n_groups, n).to(torch.int32)
    classes = None if everything else randint(0, n_classes + 1, n_groups, m)
    n_skips = draw(st.integers(0, 30))
    skip = torch.stack([randint(0, top, n_skips) for top in (n_groups, n, m)], 1)
    earlier = [
        EarlierRound(randint(0, 5, n_tokens + 1), randint(0, 5, n_classes + 1).to(torch.int16), r)
        for r in range(0 if everything else draw(st.integers(0, 2)))
    ]
    return Grid(
        tokens,
        classes,
        skip=skip if flag() else None,
        own_labels=randint(0, n_classes, n_tokens + 1) if not everything and flag() else None,
        earlier=tuple(earlier),
        blocked=randint(0, n_classes, 3) if everything and flag() else None,
        token_log_weight=torch.randn(n_groups, n, generator=generator) if flag() else None,
        class_log_weight=torch.randn(n_groups, m, generator=generator) if flag() else None,
    )


def run(kernel, scores, plan, grad, wants):
    merged, winner, seen = kernel.forward(scores, plan, observe=True)
    hidden, weight = scores.hidden, scores.rows.weight
    into = Gradients(
        torch.zeros_like(hidden) if wants[0] else None,
        (torch.zeros_like(weight),) if wants[1] else None,
        torch.zeros(len(weight), device=weight.device)
        if wants[2] and scores.bias is not None
        else None,
    )
    kernel.backward(scores, plan, merged, winner, grad, into)
    found = [t[:-1] for t in (merged, seen.largest, seen.mean)]
    return found, [into.hidden, *(into.rows or []), into.bias], winner


@on_every_device
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_plan(device, data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    n_tokens, n_classes = draw(st.integers(1, 50)), draw(st.integers(1, 90))
    width = draw(st.sampled_from([1, 7, 16, 33, 130]))
    n_grids = draw(st.integers(1, 3))
    merge = draw(st.sampled_from(["logaddexp", "maximum", "sum"]))
    grids = [draw_grid(draw, generator, n_tokens, n_classes, True) for _ in range(n_grids)]
    tile_bytes = draw(st.sampled_from([1, 20_000, 2**20]))
    plan = moved(Plan(tuple(grids), merge, n_tokens, n_classes, tile_bytes), device)
    make = draw(st.sampled_from([DenseRows, HalvedRows]))
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((n_tokens, width), (n_classes, width), (n_classes,))
    )
    scores = Scores(
        hidden,
        make(weight / width**0.5),
        bias if draw(st.booleans()) else None,
        draw(st.sampled_from([1.0, -0.6])),
        draw(st.sampled_from([None, 2.0])),
    )
    grad = torch.cat([torch.randn(n_tokens, generator=generator), torch.zeros(1)]).to(device)
    wants = draw(st.sampled_from([(True, True, True), (True, False, True), (False, True, False)]))
    plain = run(stream_torch, scores, plan, grad, wants)
    deterministic = draw(st.booleans())
    torch.use_deterministic_algorithms(deterministic)
    try:
        fused, again = (run(stream_triton, scores, plan, grad, wants) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    compare(plain, fused, merge)
    if deterministic:
        for left, right in zip((*fused[0], *fused[1]), (*again[0], *again[1]), strict=True):
            assert left is right or torch.equal(left.nan_to_num(), right.nan_to_num())


def compare(plain, fused, merge):
    for left, right in zip(fused[0], plain[0], strict=True):
        torch.testing.assert_close(left, right, equal_nan=True, **TOLERANCE)
    if merge == "maximum" and not torch.equal(plain[2][:-1], fused[2][:-1]):
        return  # a tie: either group may win, and has another gradient
    for left, right in zip(fused[1], plain[1], strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, **TOLERANCE)


def moved(plan, device):
    if device == "cpu":
        return plan
    grids = tuple(Grid(**{k: _moved(v, device) for k, v in vars(g).items()}) for g in plan.grids)
    return Plan(grids, plan.merge, plan.n_tokens, plan.n_classes, plan.tile_bytes)


def _moved(value, device):
    if isinstance(value, tuple):
        return tuple(
            EarlierRound(r.token_chunks.to(device), r.class_chunks.to(device), r.reach)
            for r in value
        )
    return value.to(device) if isinstance(value, torch.Tensor) else value


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
        assert_same(name, hidden, weight, labels, bias)


# ------------------------------------------------------------------------------------- the choice


def test_auto_on_a_cpu_is_the_torch_backend():
    rows = DenseRows(torch.ones(3, 2))
    assert choose_kernel("auto", torch.ones(2, 2), rows) is stream_torch


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
    hidden, rows = torch.ones(2, 2), DenseRows(torch.ones(3, 2))
    assert choose_kernel("auto", hidden, rows) is stream_torch
    with pytest.raises(ArgumentError, match=r"Triton is not installed.*hf_rece\[triton\]"):
        choose_kernel("triton", hidden, rows)


def test_auto_takes_triton_where_a_gpu_is_served(monkeypatch):
    monkeypatch.setattr(stream, "_has_fast_gpu", lambda hidden: True)
    monkeypatch.setattr(stream_triton, "is_interpreted", lambda: True)
    assert choose_kernel("auto", torch.ones(2, 2), DenseRows(torch.ones(3, 2))) is stream_triton
