"""The parts of a plan that processes score are together the plan, each pair once."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.ops.lsh import buckets, random_directions
from hf_rece.ops.plan import walk
from hf_rece.ops.plans.exhaustive import exhaustive_plan
from hf_rece.ops.plans.rece import rece_plan
from hf_rece.ops.plans.sampled import draw_negatives, sampled_plan
from hf_rece.ops.plans.sce import sce_plan
from hf_rece.ops.plans.stratified import stratified_plan
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.shards import ShardedRows, VocabShards
from hf_rece.ops.vocab_parallel import local_plan

EXCLUDED = torch.tensor([0, 9])


def plan_of(name, hidden, rows, labels, tile_bytes):
    more = {"excluded_ids": EXCLUDED, "tile_bytes": tile_bytes}
    if name == "exhaustive":
        return exhaustive_plan(labels, rows.n_rows, **more)
    if name == "rece":
        directions = torch.stack([random_directions(5, hidden) for _ in range(3)])
        return rece_plan(hidden, rows, labels, directions, n_chunks=5, n_extra_chunks=1, **more)
    if name == "sce":
        directions = random_directions(4, hidden)
        return sce_plan(hidden, rows, labels, directions, bucket_size_x=3, bucket_size_y=6, **more)
    if name == "stratified":
        knobs = {"n_groups": 3, "n_hard": 5, "n_random": 7, "bias": None, "generator": None}
        return stratified_plan(hidden, rows, labels, **knobs, **more)
    negatives = draw_negatives(
        labels, rows.n_rows, n_negatives=9, sampler="log_uniform", n_draws=1, logq=True,
        excluded_ids=EXCLUDED, generator=None,
    )  # fmt: skip
    knobs = {"sequence_ids": None, "merge": "logaddexp", "tile_bytes": tile_bytes}
    return sampled_plan(labels, rows.n_rows, negatives, **knobs)


def pairs_of(plan, first=0):
    """How often each (group, token, class, log-weight) is scored."""
    found = Counter()
    for tile in walk(plan, 4):
        n_groups, n = tile.tokens.shape
        classes = tile.classes
        if isinstance(classes, slice):
            classes = torch.arange(classes.start, classes.stop)[None]
        kept = torch.ones(n_groups, n, classes.shape[1], dtype=torch.bool)
        if tile.dropped is not None:
            kept &= ~tile.dropped
        if tile.skip is not None:
            kept.view(-1)[tile.skip] = False
        kept &= (tile.tokens < plan.n_tokens).unsqueeze(2)
        for group, token, place in kept.nonzero().tolist():
            weight = 0.0
            if tile.token_log_weight is not None:
                weight += tile.token_log_weight[group, token].item()
            if tile.class_log_weight is not None:
                weight += tile.class_log_weight[group, place].item()
            pair = int(tile.tokens[group, token]), first + int(classes[group, place])
            found[(tile.first_group + group, *pair, round(weight, 5))] += 1
    return found


class AmongOthers(VocabShards):
    """One process of several, which knows what the others would have told it."""

    def rows(self, weight, directions):
        """Return this process's rows of a weight (C, D), hashed by directions (R, B, D)."""
        told = [
            torch.stack(
                [
                    torch.bincount(
                        buckets(DenseRows(weight[first:stop]), of_round, 10_000), minlength=5
                    )
                    for first, stop in pairwise(self.bounds)
                ]
            )
            for of_round in directions
        ]
        object.__setattr__(self, "told", iter(told))
        return ShardedRows(DenseRows(weight[self.first : self.stop]), self)

    def join(self, values, sizes):
        """Return how many classes each process has in each bucket."""
        found = next(self.told)
        assert torch.equal(found[self.rank], values[0])
        return found


@pytest.mark.parametrize("name", ["exhaustive", "rece", "sce", "stratified", "sampled"])
@settings(max_examples=12, deadline=None)
@given(
    n_tokens=st.integers(1, 14),
    n_classes=st.integers(17, 40),
    world_size=st.integers(1, 5),
    tile_bytes=st.sampled_from([500, 10**6]),
    seed=st.integers(0, 99),
)
def test_the_parts_of_all_processes_are_the_plan(
    name, n_tokens, n_classes, world_size, tile_bytes, seed
):
    torch.manual_seed(seed)
    hidden, rows = torch.randn(n_tokens, 4), DenseRows(torch.randn(n_classes, 4))
    labels = torch.randint(10, n_classes, (n_tokens,))
    torch.manual_seed(seed + 1)
    plan = plan_of(name, hidden, rows, labels, tile_bytes)
    parts = Counter()
    for rank in range(world_size):
        shards = VocabShards(n_classes, rank, world_size)
        if name == "rece":
            torch.manual_seed(seed + 1)
            directions = [random_directions(5, hidden) for _ in range(3)]
            own = AmongOthers(n_classes, rank, world_size).rows(rows.weight, directions)
            torch.manual_seed(seed + 1)
            local = local_plan(plan_of(name, hidden, own, labels, tile_bytes), shards)
        else:
            local = local_plan(plan, shards)
        assert local.n_classes == shards.n_local
        parts += pairs_of(local, shards.first)
    assert parts == pairs_of(plan)
    assert not any(pair[2] == labels[pair[1]] for pair in parts)
