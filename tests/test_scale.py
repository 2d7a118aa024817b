"""The simulator of many devices: held against what was measured on this one."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from hf_rece.embeddings.sharded import ShardedEmbedding, draw_rows
from hf_rece.losses import build_loss
from hf_rece.ops.shards import shard_classes
from tests.processes import in_processes, record_messages

BENCHMARKS = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scale_model

    return scale_model


@pytest.fixture
def steps(model):
    import scale_measured

    return scale_measured


def off(measured, predicted):
    return max(measured / predicted, predicted / measured)


def test_steps_that_were_not_fitted_are_predicted(model, steps):
    processor = steps.fitted([(c, row["seconds"]) for _, c, row in steps.measured(steps.FITTED)])
    held_out = steps.measured(steps.HELD_OUT)
    assert len(held_out) >= 10
    in_seconds, in_bytes = [], []
    for _, case, row in held_out:
        cost = model.cost_of(case)
        own = 0 if case.updates else cost.memory["table"]
        if "seconds" in row:
            in_seconds.append(off(row["seconds"], sum(model.seconds(cost, processor).values())))
        in_bytes.append(off(row["extra_peak_mib"] * 2**20, cost.bytes - own))
    assert max(in_seconds) < 5
    assert median(in_seconds) < 2
    assert max(in_bytes) < 1.25
    assert any(case.is_cut for _, case, _ in held_out)


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


def test_groups_of_a_node_keep_their_states_to_themselves(model):
    alone, by_8 = (
        model.cost_of(case_of(model, sharding=name, ranks=1024, loss="stratified"))
        for name in ("vocab_parallel", "vocab_parallel_8")
    )
    assert alone.memory["states of all"] == 128 * by_8.memory["states of all"] > 10**9
    assert by_8.sent - by_8.near == pytest.approx(2 * 127 / 128 * by_8.memory["table"])
    assert alone.near == 0 < by_8.near < alone.sent / 50
    gpu = model.GPUS["H100-80"]
    of_near = model.seconds(by_8, gpu, 1024)["messages"]
    assert of_near < model.seconds(replace(by_8, near=0.0), gpu, 1024)["messages"]


def test_a_billion_items_under_stratified_fit_groups_of_64(model):
    gigabytes = {
        name: model.cost_of(
            case_of(model, items=10**9, ranks=1024, loss="stratified", sharding=name)
        ).bytes
        / 1e9
        for name in ("vocab_parallel_8", "vocab_parallel_64")
    }
    assert gigabytes["vocab_parallel_64"] < 0.9 * 80 < gigabytes["vocab_parallel_8"]


SENT = (512, 6000, 32)  # tokens of each process, classes, width


def bytes_sent(rank):
    """Return the bytes that each loss sends in a step, messages of a ring counted as in a ring."""
    n_tokens, n_classes, width = SENT
    table = ShardedEmbedding(shard_classes(n_classes), width)
    draw_rows(table.weight, table.shards, std=0.1)
    ids = torch.randint(n_classes, (2, n_tokens))
    found, sent = {}, record_messages()
    for name in ("cross_entropy", "rece", "sce", "stratified"):
        build_loss(name)(table(ids[0]), table.rows, ids[1]).backward()
        found[name] = sum(_bytes_of(*message, rank, table.shards.world_size) for message in sent)
        sent.clear()
    return found


def _bytes_of(name, shape, row_bytes, rank, world_size):
    if name == "all_to_all_single":
        return row_bytes * (sum(shape[0]) - shape[0][rank])
    rows = shape[0] if shape else 1
    times = {"all_gather": world_size - 1, "all_reduce": 2 * (world_size - 1) / world_size}
    return row_bytes * rows * times.get(name, 1)


def test_messages_are_of_the_bytes_that_processes_send(model):
    n_tokens, n_classes, width = SENT
    of_all = in_processes(bytes_sent, 4)
    for name in of_all[0]:
        case = model.Case(
            n_classes, width, n_tokens, 4, name, sharding="vocab_parallel", device="cpu"
        )
        measured = sum(found[name] for found in of_all) / 4
        assert model.cost_of(case).sent == pytest.approx(measured, rel=0.1), name


@pytest.mark.parametrize("sharding", ["ddp", "fsdp", "vocab_parallel", "vocab_parallel_8"])
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
