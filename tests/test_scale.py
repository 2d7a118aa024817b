"""The simulator of many devices: held against what was measured on this one."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scale_model

    return scale_model


def off(measured, predicted):
    return max(measured / predicted, predicted / measured)


def test_steps_that_were_not_fitted_are_predicted(model):
    processor = model.fitted([(c, row["seconds"]) for _, c, row in model.measured(model.FITTED)])
    held_out = model.measured(model.HELD_OUT)
    assert len(held_out) >= 10
    in_seconds, in_bytes = [], []
    for _, case, row in held_out:
        cost = model.cost_of(case)
        own = 0 if case.updates else cost.memory["table"]
        in_seconds.append(off(row["seconds"], sum(model.seconds(cost, processor).values())))
        in_bytes.append(off(row["extra_peak_mib"] * 2**20, cost.bytes - own))
    assert max(in_seconds) < 5
    assert median(in_seconds) < 2
    assert max(in_bytes) < 1.25


def case_of(model, **changes):
    return replace(model.Case(10**8, 64, 4096, 64, loss="sce"), **changes)


def test_only_a_cut_vocabulary_is_shared_out(model):
    def gigabytes(**changes):
        return model.cost_of(case_of(model, **changes)).bytes / 1e9

    # Table, two gradients, two moments, and the buckets of an all-reduce.
    assert gigabytes(sharding="ddp") == pytest.approx(6 * 4 * 6.4, rel=0.02)
    # Moments are shared out, but the whole table and both its gradients are there at once.
    assert gigabytes(sharding="fsdp") == pytest.approx((3 + 4 / 64) * 4 * 6.4, rel=0.02)
    assert gigabytes(sharding="vocab_parallel") < 3
    assert gigabytes(table="lma") < 12
    # A row optimiser keeps no gradient of the table, but all its moments.
    assert gigabytes(table="sparse_grad") == pytest.approx(3 * 4 * 6.4, rel=0.02)


def test_one_process_sends_nothing_however_it_is_sharded(model):
    costs = [model.cost_of(case_of(model, ranks=1, sharding=s)) for s in model.SHARDINGS]
    assert costs[0] == costs[1] == costs[2]
    assert costs[0].sent == costs[0].messages == 0


@pytest.mark.parametrize("sharding", ["ddp", "fsdp", "vocab_parallel"])
def test_more_items_cost_more(model, sharding):
    for loss in model.LOSSES:
        costs = [
            model.cost_of(case_of(model, sharding=sharding, loss=loss, items=items))
            for items in (10**7, 10**8, 10**9)
        ]
        assert costs[0].bytes < costs[1].bytes < costs[2].bytes
        assert all(cost.sent > 0 and min(cost.work.values()) >= 0 for cost in costs)


def test_what_cannot_run_is_not_simulated(model):
    assert not case_of(model, table="sparse_grad", loss="rece").is_possible
    assert not case_of(model, table="lma", sharding="vocab_parallel").is_possible
    assert case_of(model, table="lma", sharding="fsdp").is_possible


def test_a_gpu_is_given_by_its_data_sheet(model):
    a100, h100 = model.GPUS["A100-80"], model.GPUS["H100-80"]
    assert a100.memory == h100.memory == 80e9
    step = model.cost_of(case_of(model))
    slow, fast = (sum(model.seconds(step, gpu, 64).values()) for gpu in (a100, h100))
    assert fast < slow < 4 * fast
