"""The pairs that a plan scores are those that its definition names, found by brute force."""

from collections import Counter
from unittest.mock import patch

import torch
from hypothesis import strategies as st

from hf_rece.losses import LOSSES
from hf_rece.losses.options import Problem
from tests.fuzz.cases import cases
from tests.fuzz.dense import pairs_of
from tests.oracles import rece_candidates, sce_losses


@st.composite
def small(draw):
    """hidden (N, D), weight (C, D), labels (N,), excluded classes, tile_bytes, seed; float64."""
    n_tokens, n_classes = draw(st.integers(1, 20)), draw(st.integers(2, 50))
    width, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**20))
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, width, generator=make, dtype=torch.float64)
    weight = torch.randn(n_classes, width, generator=make, dtype=torch.float64)
    excluded = sorted(draw(st.sets(st.integers(0, n_classes - 2), max_size=n_classes - 1)))
    free = torch.tensor([c for c in range(n_classes) if c not in excluded])
    labels = free[torch.randint(len(free), (n_tokens,), generator=make)]
    tile_bytes = draw(st.sampled_from([1, 3000, 2**22]))
    return hidden, weight, labels, excluded, tile_bytes, make


def plan_of(name, case, **knobs):
    """The plan of a loss, and its losses of each token."""
    hidden, weight, labels, excluded, tile_bytes, make = case
    plans, stream = [], Problem.stream

    def spy(self, plan):
        plans.append(plan)
        return stream(self, plan)

    common = {"excluded_ids": excluded, "tile_bytes": tile_bytes, "generator": make}
    with patch.object(Problem, "stream", spy):
        losses = LOSSES[name].function(hidden, weight, labels, reduction="none", **common, **knobs)
    return plans[0], losses


def count(plan):
    """How often each (token, class) is scored."""
    pairs = pairs_of(plan)
    return Counter(zip(pairs.token.tolist(), pairs.scored.tolist(), strict=True))


@st.composite
def rece_cases(draw):
    case = draw(small())
    n_rounds, n_buckets = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    size = (n_rounds, n_buckets, case[0].shape[1])
    directions = torch.randn(size, generator=case[-1], dtype=torch.float64)
    return case, directions, draw(st.integers(1, 3)), draw(st.integers(0, 5))


@cases(30, rece_cases())
def test_rece_scores_neighbours_once(case):
    case, directions, buckets_per_chunk, n_extra_chunks = case
    hidden, weight, labels, excluded = case[:4]
    plan, _ = plan_of(
        "rece",
        case,
        directions=directions,
        buckets_per_chunk=buckets_per_chunk,
        n_extra_chunks=n_extra_chunks,
    )
    n_chunks = max(1, directions.shape[1] // buckets_per_chunk)
    mask = rece_candidates(hidden, weight, directions, n_chunks, n_extra_chunks, excluded)
    mask[torch.arange(len(labels)), labels] = False
    assert count(plan) == Counter(map(tuple, mask.nonzero().tolist()))


@st.composite
def sce_cases(draw):
    case = draw(small())
    hidden, weight = case[:2]
    directions = torch.randn(
        draw(st.integers(1, 8)), hidden.shape[1], generator=case[-1], dtype=torch.float64
    )
    return case, directions, draw(st.integers(1, len(hidden))), draw(st.integers(1, len(weight)))


@cases(30, sce_cases())
def test_sce_takes_the_largest_loss_of_any_bucket(case):
    case, directions, size_x, size_y = case
    hidden, weight, labels, excluded = case[:4]
    size_y = min(size_y, len(weight) - len(excluded))
    _, losses = plan_of(
        "sce", case, directions=directions, bucket_size_x=size_x, bucket_size_y=size_y
    )
    logits = hidden @ weight.T
    wanted = sce_losses(logits, hidden, weight, labels, directions, size_x, size_y, excluded)
    torch.testing.assert_close(losses, wanted)


@st.composite
def stratified_cases(draw):
    case = draw(small())
    size = st.integers(1, len(case[1]) + 3)
    return case, draw(st.integers(1, 25)), draw(size), draw(size)


@cases(30, stratified_cases())
def test_stratified_stands_for_every_class_once(case):
    case, n_groups, n_hard, n_random = case
    _, weight, labels, excluded = case[:4]
    plan, _ = plan_of("stratified", case, n_groups=n_groups, n_hard=n_hard, n_random=n_random)
    found, pairs = count(plan), pairs_of(plan)
    assert set(found.values()) <= {1}
    n_others = len(weight) - len(excluded) - 1
    for token, label in enumerate(labels.tolist()):
        own = pairs.token == token
        scored, weights = pairs.scored[own], pairs.log_weight[own].exp()
        assert not set(scored.tolist()) & {label, *excluded}
        exact = weights == 1
        # The random classes together weigh as much as there are classes outside the hard set.
        stands_for = float(weights.sum())
        assert stands_for <= n_others + 1e-4
        if bool((~exact).any()):
            assert abs(stands_for - n_others) < 1e-4


@st.composite
def sampled_cases(draw):
    case = draw(small())
    knobs = {
        "n_negatives": draw(st.integers(1, 60)),
        "sampler": draw(st.sampled_from(["uniform", "log_uniform", "in_batch"])),
    }
    return case, knobs


@cases(30, sampled_cases())
def test_negatives_are_as_many_as_drawn_less_the_label(case):
    case, knobs = case
    _, _, labels, excluded = case[:4]
    plan, _ = plan_of("sampled_softmax", case, **knobs)
    (grid,) = plan.grids
    drawn = grid.classes[0].tolist()
    assert not set(drawn) & set(excluded)
    if knobs["sampler"] == "in_batch":
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(labels.tolist())
        total = float(grid.class_log_weight.exp().sum())
        assert abs(total - min(knobs["n_negatives"], len(labels))) < 1e-3
    else:
        assert len(drawn) == knobs["n_negatives"]
    wanted = Counter(
        (token, negative)
        for token, label in enumerate(labels.tolist())
        for negative in drawn
        if negative != label
    )
    assert count(plan) == wanted
