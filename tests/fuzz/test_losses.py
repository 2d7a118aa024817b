"""Every loss on any problem is its dense self: value, reductions, and all gradients."""

import math
from dataclasses import dataclass, replace
from typing import get_args
from unittest.mock import patch

import torch

from hf_rece.losses import LOSSES, LossName
from hf_rece.losses.options import Problem as Prepared
from hf_rece.ops.stream import TokenStatistics
from tests.fuzz import dense
from tests.fuzz.cases import cases
from tests.fuzz.problems import problems
from tests.oracles import dense_logits

BINARY = ("bce", "gbce")


def run(problem, **changes):
    """The loss, and the plan that it was streamed by."""
    plans = []
    stream = Prepared.stream

    def spy(self, plan):
        plans.append(plan)
        return stream(self, plan)

    arguments = {**problem.knobs, **problem.options, **changes}
    with patch.object(Prepared, "stream", spy):
        loss = LOSSES[problem.name].function(
            problem.hidden,
            problem.weight,
            problem.labels,
            bias=problem.bias,
            generator=problem.generator(),
            **arguments,
        )
    return loss, plans[0]


def in_float64(problem):
    """The same numbers, each a leaf."""
    copies = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for t in (problem.hidden, problem.weight, problem.bias)
    ]
    return replace(problem, hidden=copies[0], weight=copies[1], bias=copies[2])


@dataclass
class Slack:
    """How far rounding may lead off: of a token's loss, and of a derivative by a logit.

    From first principles. An inner product in float32 is off by eps times the product of the norms,
    a loss by twice that, and a share of a softmax by the exponential of that.
    """

    loss: float
    share: float


def beta_of(problem):
    """The weight of the label's term under a binary link."""
    if problem.name != "gbce":
        return 1.0
    n_excluded = len(set(torch.as_tensor(problem.options.get("excluded_ids", [])).tolist()))
    t, n_others = problem.knobs["t"], max(len(problem.weight) - n_excluded - 1, 1)
    alpha = problem.knobs["n_negatives"] / n_others
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def scale_of(problem):
    return abs(problem.options.get("logit_scale", 1.0))


def dense_losses(problem, plan):
    """(N,) float64 losses of the labelled tokens, their slack, and the lead of each maximum."""
    exact, options = problem, problem.options
    labels = problem.labels.reshape(-1).long()
    labelled = labels != options["ignore_index"]
    states = exact.hidden.reshape(len(labels), exact.hidden.shape[-1])[labelled]
    scale, cap = options.get("logit_scale", 1.0), options.get("logit_softcap")
    logits = dense_logits(states, exact.weight, exact.bias, scale, cap)
    pairs, lead = dense.pairs_of(plan), torch.tensor([torch.inf])
    if problem.name == "sce":
        losses, lead = dense.largest_losses(plan, pairs, logits, labels[labelled])
    elif problem.name in BINARY:
        n_negatives = problem.knobs["n_negatives"]
        losses = dense.binary_losses(
            plan, pairs, logits, labels[labelled], n_negatives, beta_of(problem)
        )
    else:
        losses = dense.softmax_losses(plan, pairs, logits, labels[labelled])
    return losses, lead, logits


@torch.no_grad()
def slack_of(problem, exact, logits):
    dtype = torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32
    eps, width = torch.finfo(dtype).eps, problem.weight.shape[1]
    scale, cap = problem.options.get("logit_scale", 1.0), problem.options.get("logit_softcap")
    size = 0.0
    if logits.numel():
        size = float(exact.hidden.norm(dim=-1).max() * exact.weight.norm(dim=1).max())
        size = abs(scale) * (size + (0 if exact.bias is None else float(exact.bias.abs().max())))
    off = eps * (8 + 2 * math.sqrt(width)) * (size + 1)
    # softplus(x) is x above 20, in torch and here.
    linear = 3e-9 if problem.name in BINARY else 0.0
    share = min(2.0, 2 * math.expm1(min(2 * off, 1))) + 64 * eps + linear
    if cap is not None:
        share += min(1.0, off / cap)
    beta = max(1.0, beta_of(problem))
    return Slack(2 * beta * (off + linear), beta * abs(scale) * share)


def assert_within(got, wanted, slack, rtol=0.0):
    """|got - wanted| <= slack + rtol |wanted|, and no NaN."""
    off = (got.detach().double() - wanted.detach()).abs() - rtol * wanted.detach().abs()
    assert bool((off <= slack).all()), f"{float(off.max())} beyond {slack}"


def check(problem):
    """Hold value and gradients of a problem against the dense loss of the same pairs."""
    exact = in_float64(problem)
    statistics = TokenStatistics()
    each, plan = run(problem, reduction="none", statistics=statistics)
    losses, lead, logits = dense_losses(exact, plan)
    slack = slack_of(problem, exact, logits)
    eps = torch.finfo(each.dtype).eps
    assert each.shape == problem.labels.shape
    assert each.dtype == (torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32)
    labelled = problem.labels != problem.options["ignore_index"]
    assert each[~labelled].count_nonzero() == 0
    assert_within(each[labelled], losses, slack.loss, 16 * eps)

    if problem.name not in ("sce", *BINARY):
        check_statistics(problem, plan, statistics, logits.detach(), slack)
    loss, _ = run(problem)
    upstream, wanted = reduced(problem, each, labelled, losses)
    n_tokens, factor = len(losses), upstream.abs().max().item() if upstream.numel() else 0.0
    assert_within(loss, wanted, factor * n_tokens * (slack.loss + 16 * eps), 64 * eps)
    check_gradients(problem, exact, loss, wanted, slack, lead, factor, n_tokens)


def check_statistics(problem, plan, statistics, logits, slack):
    """Entropy and top-1 of the softmax over label and pairs, in proportion to their log-weights."""
    labelled = problem.labels != problem.options["ignore_index"]
    labels, pairs = problem.labels[labelled].long(), dense.pairs_of(plan)
    tokens = torch.cat([torch.arange(len(labels)), pairs.token])
    values = logits[tokens, torch.cat([labels, pairs.scored])]
    weights = torch.cat([torch.zeros(len(labels), dtype=torch.float64), pairs.log_weight])
    total = dense.log_sum_exp_by(values + weights, tokens, len(labels))
    share = (values + weights - total[tokens]).exp()
    mean = torch.zeros(len(labels), dtype=torch.float64).index_add(0, tokens, share * values)
    largest = torch.full_like(total, -torch.inf).scatter_reduce(0, tokens, values, "amax")
    own = values[: len(labels)]
    size = 1 + float(values.abs().max()) if len(values) else 1.0
    of_share = min(2.0, 3 * slack.loss) + 3e-5
    assert_within(statistics.entropy[labelled], total - mean, slack.loss + of_share * size)
    apart = (largest - own).abs() > slack.loss
    is_top1 = statistics.is_top1[labelled]
    assert torch.equal(is_top1[apart], (own >= largest)[apart])
    assert bool(is_top1[largest == own].all())


def reduced(problem, each, labelled, losses):
    """What reduction makes of the dense losses, and d(that) / d(loss of a token)."""
    reduction, count = problem.options["reduction"], problem.options.get("num_items_in_batch")
    spread = torch.zeros(labelled.numel(), dtype=torch.float64)
    spread = spread.index_put((labelled.reshape(-1).nonzero()[:, 0],), losses).view(labelled.shape)
    if reduction == "none":
        return torch.ones(1), spread
    if reduction == "sum":
        return torch.ones(1), spread.sum()
    if count is None:
        counted = each != 0 if problem.name == "sce" else labelled
        count = int(counted.sum())
    count = max(1.0, float(count))
    return torch.tensor([1 / count]), spread.sum() / count


def check_gradients(problem, exact, loss, wanted, slack, lead, factor, n_tokens):
    names = [
        name
        for name in ("hidden", "weight", "bias")
        if getattr(problem, name) is not None and getattr(problem, name).requires_grad
    ]
    assert loss.requires_grad == bool(names)
    doubtful = bool((lead <= 4 * slack.loss).any())  # which of two buckets has the larger loss
    if not names or doubtful:
        return
    got = torch.autograd.grad(loss.sum(), [getattr(problem, name) for name in names])
    expected = torch.autograd.grad(
        wanted.sum(), [getattr(exact, name) for name in names], allow_unused=True
    )
    states, rows = (
        t.detach().abs().max() if t.numel() else 0 for t in (exact.hidden, exact.weight)
    )
    for name, own, dense_grad in zip(names, got, expected, strict=True):
        tensor = getattr(problem, name)
        assert own.dtype == tensor.dtype
        assert own.shape == tensor.shape
        if problem.options.get("sparse_grad") and name != "hidden":
            assert own.is_sparse
        by = {"hidden": rows, "weight": n_tokens * states, "bias": n_tokens}[name]
        if dense_grad is None:
            dense_grad = torch.zeros(own.shape, dtype=torch.float64)
        finite = dense_grad.abs() < 0.5 * torch.finfo(own.dtype).max
        rounding = torch.finfo(own.dtype)
        # Gradients of a tensor are summed in float32 if it is narrower than float64.
        summed = 256 * max(torch.finfo(loss.dtype).eps, min(rounding.eps, 2**-23))
        share = slack.share + summed * max(1.0, beta_of(problem)) * scale_of(problem)
        assert_within(
            own.to_dense()[finite],
            dense_grad[finite],
            float(by) * factor * share + rounding.smallest_normal * rounding.eps,
            2 * rounding.eps,
        )


def property_of(name, few):
    def test(case):
        check(case)

    test.__name__ = f"test_{name}"
    return cases(few, problems(name))(test)


test_cross_entropy = property_of("cross_entropy", 40)
test_rece = property_of("rece", 40)
test_sce = property_of("sce", 40)
test_stratified = property_of("stratified", 40)
test_sampled_softmax = property_of("sampled_softmax", 40)
test_bce = property_of("bce", 40)
test_gbce = property_of("gbce", 40)


def test_every_loss_has_a_property():
    assert all(f"test_{name}" in globals() for name in get_args(LossName))
