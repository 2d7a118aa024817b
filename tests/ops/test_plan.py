"""Grids are walked tile by tile, each pair once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.errors import ArgumentError
from hf_rece.ops.plan import (
    MIN_TILE_SIDE,
    EarlierRound,
    Grid,
    Plan,
    resolve_tile_bytes,
    tile_shape,
    walk,
)


def pairs_of(plan, width=4):
    """Count how often each (token, class) pair is scored, by brute force over the tiles."""
    count = torch.zeros(plan.n_tokens + 1, plan.n_classes + 1, dtype=torch.long)
    for tile in walk(plan, width):
        classes = tile.classes
        if isinstance(classes, slice):
            classes = torch.arange(classes.start, classes.stop).unsqueeze(0)
        scored = torch.ones(*tile.tokens.shape, classes.shape[1], dtype=torch.bool)
        if tile.dropped is not None:
            scored &= ~tile.dropped
        if tile.skip is not None:
            scored.view(-1)[tile.skip] = False
        for g, n, m in scored.nonzero().tolist():
            count[tile.tokens[g, n], classes[g, m]] += 1
    return count[:-1, :-1]


@settings(max_examples=40, deadline=None)
@given(
    n_groups=st.integers(1, 500),
    n=st.integers(1, 5000),
    m=st.integers(1, 5000),
    width=st.integers(1, 4096),
    tile_bytes=st.integers(1, 2**26),
)
def test_a_tile_keeps_to_its_budget_but_never_collapses(n_groups, n, m, width, tile_bytes):
    groups, tokens, classes = tile_shape(n_groups, n, m, width, tile_bytes)
    assert 1 <= groups <= n_groups
    assert min(n, MIN_TILE_SIDE) <= tokens <= n
    assert min(m, MIN_TILE_SIDE) <= classes <= m
    size = 4 * groups * (tokens * classes + 2 * (tokens + classes) * width)
    floor = 4 * (MIN_TILE_SIDE**2 + 4 * MIN_TILE_SIDE * width)
    assert size <= max(tile_bytes, floor) or (tokens, classes) == (MIN_TILE_SIDE, MIN_TILE_SIDE)


def test_recommender_shapes_do_not_collapse_either():
    # A rule made for language models, rows = next_power_of_2(N / (C / D)), gives 2 rows here.
    _, tokens, classes = tile_shape(1, 25_600, 1_000_000, 64, 4 * 2**20)
    assert tokens > 500
    assert classes > 500


@pytest.mark.parametrize("tile_bytes", [1, 30_000, 2**22])
def test_the_exhaustive_grid_scores_each_pair_but_the_skipped_and_blocked(tile_bytes):
    tokens = torch.arange(150, dtype=torch.int32).unsqueeze(0)
    skip = torch.tensor([[0, 3, 7], [0, 149, 199]])
    grid = Grid(tokens, None, skip=skip, blocked=torch.tensor([0, 70]))
    count = pairs_of(Plan((grid,), "logaddexp", 150, 200, tile_bytes))
    wanted = torch.ones(150, 200, dtype=torch.long)
    wanted[:, [0, 70]] = 0
    wanted[3, 7] = wanted[149, 199] = 0
    assert torch.equal(count, wanted)


@pytest.mark.parametrize("tile_bytes", [1, 2_000, 2**22])
def test_groups_with_padding_and_earlier_rounds_score_each_pair_once(tile_bytes):
    tokens = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    classes = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 7]], dtype=torch.int32)
    first = Grid(tokens[:, :], classes.masked_fill(classes == 7, 7))
    second = Grid(
        torch.tensor([[0, 1, 2, 3, 4, 5]], dtype=torch.int32),
        torch.arange(7, dtype=torch.int32).unsqueeze(0),
        earlier=(
            EarlierRound(
                torch.tensor([0, 0, 1, 1, 2, 2, 0]), torch.tensor([0, 0, 0, 1, 1, 1, 2, 0]), 0
            ),
        ),
    )
    count = pairs_of(Plan((first, second), "logaddexp", 6, 7, tile_bytes))
    assert torch.equal(count, torch.ones(6, 7, dtype=torch.long))


def test_own_labels_are_dropped_wherever_they_occur():
    grid = Grid(
        torch.tensor([[0, 1]], dtype=torch.int32),
        torch.tensor([[2, 2, 0]], dtype=torch.int32),
        own_labels=torch.tensor([2, 1, 3]),
    )
    count = pairs_of(Plan((grid,), "logaddexp", 2, 3, 2**20))
    assert count.tolist() == [[1, 0, 0], [1, 0, 2]]


def test_groups_that_compete_keep_their_classes_whole():
    grid = Grid(
        torch.arange(400, dtype=torch.int32).unsqueeze(0),
        torch.arange(900, dtype=torch.int32).unsqueeze(0),
    )
    tiles = list(walk(Plan((grid,), "maximum", 400, 900, 100_000), 8))
    assert len(tiles) > 1
    assert all(tile.classes.shape[1] == 900 for tile in tiles)


def test_the_default_budget_depends_on_the_device():
    cpu, cuda = (resolve_tile_bytes(None, torch.device(name)) for name in ("cpu", "cuda"))
    assert cpu < cuda
    with pytest.raises(ArgumentError, match="tile_bytes=-1"):
        resolve_tile_bytes(-1, torch.device("cpu"))
