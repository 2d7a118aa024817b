"""What every backend of the streaming kernel is held to: whole losses, and any plan, by torch."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from hf_rece.losses import build_loss
from hf_rece.ops.plan import EarlierRound, Grid, Plan
from hf_rece.ops.rows import DenseRows, add_rows
from hf_rece.ops.stream import TokenStatistics
from hf_rece.ops.stream_torch import Gradients, Scores

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


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


def loss_and_grads(name, backend, hidden, weight, labels, bias, observe=True, **knobs):
    """Return losses (the labels' shape), statistics, and gradients."""
    generator = torch.Generator(labels.device).manual_seed(3)
    noted = TokenStatistics() if observe else None
    losses = build_loss(name, **KNOBS[name], **knobs)(
        hidden, weight, labels, bias=bias, backend=backend, reduction="none",
        generator=generator, statistics=noted,
    )  # fmt: skip
    factor = torch.linspace(-1, 2, losses.numel(), device=losses.device).view_as(losses)
    wanted = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    grads = torch.autograd.grad((losses * factor).sum(), wanted)
    seen = [] if noted is None else [noted.entropy, noted.is_top1]
    return [losses.detach(), *seen, *grads]


def assert_same(name, backend, *tensors, tolerance=TOLERANCE, **knobs):
    """Assert that losses, statistics and gradients of a backend are those of torch."""
    plain, fused = (loss_and_grads(name, b, *tensors, **knobs) for b in ("torch", backend))
    for left, right in zip(fused, plain, strict=True):
        torch.testing.assert_close(left, right, equal_nan=True, **tolerance)


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


def run(kernel, scores, plan, grad, wants, observe=True):
    """Return merged values with what was observed, gradients, and winners."""
    merged, winner, seen = kernel.forward(scores, plan, observe=observe)
    hidden, weight = scores.hidden, scores.rows.weight
    into = Gradients(
        torch.zeros_like(hidden) if wants[0] else None,
        (torch.zeros_like(weight),) if wants[1] else None,
        torch.zeros(len(weight), device=weight.device)
        if wants[2] and scores.bias is not None
        else None,
    )
    kernel.backward(scores, plan, merged, winner, grad, into)
    found = [merged[:-1]] if seen is None else [t[:-1] for t in (merged, seen.largest, seen.mean)]
    return found, [into.hidden, *(into.rows or []), into.bias], winner


def draw_case(draw, device="cpu"):
    """Return scores, a plan, gradients of its merged values, and which gradients are wanted."""
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
    return scores, plan, grad, wants


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
