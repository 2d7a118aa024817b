"""memory_budget: how it is read, and what it chooses."""

import json
import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.errors import ArgumentError
from hf_rece.losses import LOSSES, LossName, build_loss
from hf_rece.losses.budget import parse_bytes
from hf_rece.losses.estimates import Shape
from hf_rece.losses.options import Options, prepare

NAMES = get_args(LossName)
every_loss = pytest.mark.parametrize("name", NAMES)
GREEDY = ("rece", "sce", "stratified")  # more memory buys them candidates
TILE = dict.fromkeys(NAMES, 4 * 2**20) | {"cross_entropy": 8 * 2**20}
SHAPE = Shape(4096, 100_000, 64, has_ignored=True)


def chosen(name, shape, tile_bytes=None, **knobs):
    return LOSSES[name].choose(LOSSES[name].config(**knobs), shape, tile_bytes)


def floor_of(name, shape, **knobs):
    with pytest.raises(ArgumentError) as error:
        chosen(name, shape, memory_budget=1, **knobs)
    return int(re.search(r"at least (\d+) B", str(error.value))[1])


# ------------------------------------------------------------------------------------ how written


@pytest.mark.parametrize(
    ("written", "n_bytes"),
    [(7, 7), ("7", 7), ("7B", 7), ("2KiB", 2048), ("2kb", 2000), ("1.5 MiB", 1572864),
     ("3MB", 3_000_000), ("2GiB", 2**31), ("2 GB", 2 * 10**9), ("1TiB", 2**40)],
)  # fmt: skip
def test_amounts_of_memory(written, n_bytes):
    assert parse_bytes(written)[0] == n_bytes


@pytest.mark.parametrize(
    "written", ["", "GiB", "2 gigs", "-1GiB", "1,5GiB", "0", 0, -5, True, 1.5, "inf", [1]]
)
@every_loss
def test_what_is_no_amount_is_named_when_the_loss_is_built(name, written):
    with pytest.raises(ArgumentError, match=r"memory_budget=.*such as '2GiB'"):
        build_loss(name, memory_budget=written)


@every_loss
def test_survives_json(name):
    loss = build_loss(name, memory_budget="2GiB")
    assert build_loss(**json.loads(json.dumps(loss.to_dict()))) == loss


# ------------------------------------------------------------------------------------ what it does


@every_loss
def test_a_budget_too_small_names_one_that_is_enough(name, inputs):
    hidden, weight, labels = inputs(n_tokens=64, n_classes=3000, width=8, dtype=torch.float32)
    with pytest.raises(ArgumentError, match=r"memory_budget='20KB'.*at least .* KB") as error:
        build_loss(name, memory_budget="20KB")(hidden, weight, labels)
    enough = re.search(r"Pass memory_budget='([\d.]+KB)'", str(error.value))[1]
    assert torch.isfinite(build_loss(name, memory_budget=enough)(hidden, weight, labels))


@every_loss
@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(1, 50_000),
    n_classes=st.integers(1, 3_000_000),
    width=st.integers(1, 600),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    more=st.lists(st.integers(0, 2**33), min_size=2, max_size=5),
    softcap=st.booleans(),
)
def test_a_larger_budget_never_gives_fewer_candidates(
    name, n_tokens, n_classes, width, dtype, more, softcap
):
    shape = Shape(n_tokens, n_classes, width, dtype, has_softcap=softcap, has_ignored=True)
    floor = floor_of(name, shape)
    candidates = []
    for budget in sorted(floor + extra for extra in more):
        choice = chosen(name, shape, memory_budget=budget)
        assert choice.estimate.bytes <= choice.estimate.bound <= budget
        assert choice.tile_bytes <= TILE[name]
        candidates.append(choice.estimate.candidates)
    assert candidates == sorted(candidates)
    assert max(candidates) <= n_classes


@pytest.mark.parametrize("name", GREEDY)
def test_a_budget_buys_candidates(name):
    few = chosen(name, SHAPE, memory_budget=floor_of(name, SHAPE))
    default, many = chosen(name, SHAPE), chosen(name, SHAPE, memory_budget="80MiB")
    assert few.estimate.candidates < default.estimate.candidates
    assert default.estimate.candidates < many.estimate.candidates
    assert few.tile_bytes <= many.tile_bytes


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("n_classes", [1, 2, 90, 100_000])
def test_no_budget_buys_more_time_than_an_eighth_of_the_exact_loss(name, n_classes):
    shape = replace(SHAPE, n_classes=n_classes, n_weights=64 * n_classes)
    exact, default = chosen("cross_entropy", shape), chosen(name, shape)
    most = max(exact.estimate.flops / 8, default.estimate.flops)
    for budget in ("50MiB", "100MiB", "1GiB", "100GiB"):
        assert chosen(name, shape, memory_budget=budget).estimate.flops <= most
    if n_classes > 90:
        assert chosen(name, shape, memory_budget="100GiB").estimate.flops > 0.8 * most


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("rece", {"n_buckets": 100}),
        ("rece", {"n_extra_chunks": 3}),
        ("rece", {"n_buckets": 100, "n_extra_chunks": 0, "n_rounds": 3}),
        ("sce", {"bucket_size_y": 256}),
        ("sce", {"n_buckets": 12, "bucket_size_x": 100}),
        ("sce", {"n_buckets": 12, "bucket_size_x": 100, "bucket_size_y": 9}),
        ("stratified", {"n_hard": 256}),
        ("stratified", {"n_random": 256}),
        ("stratified", {"n_groups": 50}),
        ("stratified", {"n_hard": 256, "n_random": 256}),
        ("stratified", {"n_hard": 256, "n_random": 256, "n_groups": 9}),
        ("gbce", {"n_negatives": 100, "t": 0.5}),
    ],
)
@pytest.mark.parametrize("budget", ["50MiB", "200MiB", "500GiB"])
def test_knobs_that_are_given_are_kept(name, knobs, budget):
    config = chosen(name, SHAPE, memory_budget=budget, **knobs).config
    assert {knob: getattr(config, knob) for knob in knobs} == knobs


@every_loss
def test_a_tile_that_is_given_is_kept(name):
    assert chosen(name, SHAPE, 123_456, memory_budget="90MiB").tile_bytes == 123_456


@every_loss
def test_without_a_budget_nothing_changes(name):
    choice = chosen(name, SHAPE)
    assert choice.tile_bytes == TILE[name]
    assert chosen(name, SHAPE, 999).tile_bytes == 999


@every_loss
def test_the_choice_is_the_same_however_many_tokens_are_ignored(name, inputs):
    hidden, weight, labels = inputs(n_tokens=30, n_classes=500, dtype=torch.float32)
    for n_ignored in (0, 7, 29):
        labels[:n_ignored] = -100
        problem = prepare(hidden, weight, labels, Options())
        assert problem.cost_shape("16MiB") == Shape(30, 500, 6, n_weights=3000, has_ignored=True)
        assert torch.isfinite(build_loss(name, memory_budget="16MiB")(hidden, weight, labels))


@every_loss
def test_a_frozen_table_takes_less(name):
    frozen = replace(SHAPE, n_weights=0)
    spared = floor_of(name, SHAPE) - floor_of(name, frozen)
    assert 0.85 * 4 * 100_000 * 64 < spared <= 4 * 100_000 * 64
