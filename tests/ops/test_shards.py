"""Rows that are cut over processes: lookup, hashing, top-k and ranks are those of one process."""

import pytest
import torch

from hf_rece.errors import ArgumentError
from hf_rece.ops import topk
from hf_rece.ops.lookup import lookup
from hf_rece.ops.lsh import buckets, sort_into_chunks, sort_shard_into_chunks
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.same_draws import same_draws
from hf_rece.ops.shards import ShardedRows, VocabShards, shard_classes
from hf_rece.ops.topk import label_rank, streamed_topk
from hf_rece.ops.vocab_mesh import vocab_mesh
from tests.processes import in_processes

N_CLASSES, WIDTH = 103, 6
SEARCHES = {
    "plain": {},
    "excluded": {"excluded_ids": torch.tensor([0, 5, 77])},
    "allowed": {"allowed_ids": torch.tensor([90, 3, 4, 50, 51])},
    "allowed of one process": {"allowed_ids": torch.tensor([3, 4])},
    "seen": {"seen_ids": torch.arange(27).view(9, 3) * 3 - 1},
    "small tiles": {"tile_bytes": 4 * 64 * 16},
}
RANKS = ("plain", "excluded", "seen", "small tiles")
IDS = [torch.tensor([[5, 102, 5], [0, 50, 51]]), torch.zeros(0, dtype=torch.long),
       torch.tensor([102]), torch.tensor([1, 2, 3, 26, 27])]  # fmt: skip


def table():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N_CLASSES, WIDTH, generator=generator)
    weight[60] = weight[7]  # a tie over processes
    hidden = torch.randn(9, WIDTH, generator=generator)
    labels = torch.randint(N_CLASSES, (9,), generator=generator)
    labels[0] = 7
    return hidden, weight, labels, torch.randn(N_CLASSES, generator=generator)


def search_all(hidden, rows, labels, bias, offset):
    found = {}
    for name, limits in SEARCHES.items():
        found[f"topk, {name}"] = streamed_topk(hidden, rows, 12, bias=bias, **limits)
    for name in RANKS:
        found[f"rank, {name}"] = label_rank(hidden, rows, labels, bias=bias, **SEARCHES[name])
    found["rank, no bias"] = label_rank(hidden, rows, labels)
    return found


def of_processes(rank, world_size):
    shards = shard_classes(N_CLASSES)
    assert (shards.rank, shards.world_size) == (rank, world_size)
    hidden, weight, labels, bias = table()
    classes = slice(shards.first, shards.stop)
    local = weight[classes].clone().requires_grad_()
    rows = ShardedRows(DenseRows(local), shards)
    with torch.no_grad():
        found = search_all(hidden, rows, labels, bias[classes], shards.first)
        topk._JOINED_BYTES = 1000  # of two or four queries at once
        found["in pieces"] = streamed_topk(hidden, rows, 12, bias=bias[classes])
    ids = IDS[rank]
    found["rows"] = lookup(rows, ids)
    (found["rows"] * (rank + 1)).sum().backward()
    found["rows"] = found["rows"].detach()
    found["grad"] = local.grad
    with torch.no_grad():
        found["slice"] = rows.rows(slice(20, 60))
    for name, wrong in (("too large", N_CLASSES), ("negative", -1)):
        with pytest.raises(ArgumentError) as caught:
            lookup(rows, torch.tensor([wrong if rank == 1 else 1]))
        found[name] = str(caught.value)
    found["chunks"] = {}
    own = buckets(rows.local, torch.eye(WIDTH), 10_000)
    for n_chunks in (1, 5, 40):
        chunks = sort_shard_into_chunks(own, WIDTH, n_chunks, shards)
        ids = chunks.table(padding=shards.n_local)
        row, column = chunks.places(torch.arange(shards.n_local))
        same = torch.equal(ids[row, column], torch.arange(shards.n_local, dtype=torch.int32))
        of_all = torch.where(ids < shards.n_local, ids + shards.first, -1).tolist()
        found["chunks"][n_chunks] = of_all, chunks.numbers(), same
    generator = torch.Generator().manual_seed(rank)
    with same_draws(shards, generator, torch.device("cpu")):
        found["drawn"] = torch.rand(3, generator=generator)
    found["drawn next"] = torch.rand(3, generator=generator)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def processes(request):
    return in_processes(of_processes, request.param, request.param)


def test_searches_are_those_of_one_process(processes):
    hidden, weight, labels, bias = table()
    wanted = search_all(hidden, weight, labels, bias, 0)
    for found in processes:
        for name, parts in wanted.items():
            if not name.startswith("topk"):
                for got, part in zip(found[name], parts, strict=True):
                    assert torch.equal(got, part), name
                continue
            torch.testing.assert_close(found[name][0], parts[0])
            tied = torch.tensor([7, 60])  # in either order
            ids = [torch.where(torch.isin(i, tied), 7, i) for i in (found[name][1], parts[1])]
            assert torch.equal(*ids), name


def test_what_processes_found_best_is_joined_in_pieces(processes):
    for found in processes:
        assert all(map(torch.equal, found["in pieces"], found["topk, plain"]))


def test_chunks_are_those_of_all_classes(processes):
    bucket_of = buckets(DenseRows(table()[1]), torch.eye(WIDTH), 10_000)
    for n_chunks in (1, 5, 40):
        wanted = sort_into_chunks(bucket_of, n_chunks)
        parts = [found["chunks"][n_chunks] for found in processes]
        assert torch.equal(
            torch.cat([numbers[:-1] for _, numbers, _ in parts]), wanted.numbers()[:-1]
        )
        every = [{int(i) for i in row if i < N_CLASSES} for row in wanted.table(N_CLASSES)]
        for row, ids in enumerate(every):
            assert ids == {i for found_table, _, _ in parts for i in found_table[row] if i >= 0}
        assert all(same for _, _, same in parts)


def test_each_process_finds_the_rows_it_asks_for(processes):
    weight = table()[1]
    for found, ids in zip(processes, IDS, strict=False):
        assert torch.equal(found["rows"], weight[ids])
        assert torch.equal(found["slice"], weight[20:60])


def test_a_lookup_s_gradient_is_the_mean_over_processes(processes):
    weight = table()[1].requires_grad_()
    total = sum((rank + 1) * weight[IDS[rank]].sum() for rank in range(len(processes)))
    (total / len(processes)).backward()
    got = torch.cat([found["grad"] for found in processes])
    torch.testing.assert_close(got, weight.grad)


@pytest.mark.parametrize("name", ["too large", "negative"])
def test_an_id_out_of_range_in_one_process_is_said_in_all(processes, name):
    for found in processes:
        assert "out of range: the table has 103 rows" in found[name]


def test_draws_are_those_of_the_first_process(processes):
    generator = torch.Generator().manual_seed(0)
    for name in ("drawn", "drawn next"):
        wanted = torch.rand(3, generator=generator)
        for found in processes:
            assert torch.equal(found[name], wanted)


# ---------------------------------------------------------------------------- several groups


def in_meshes(rank):
    """What each arrangement of four processes finds, all of which are seeded alike."""
    found = {}
    for size in (1, 2, 4):
        shards = shard_classes(N_CLASSES, vocab_mesh(size))
        place = shards.data_rank, shards.rank, shards.data_size, shards.world_size
        drawn = []
        for generator in (None, torch.Generator().manual_seed(0)):
            torch.manual_seed(0)
            with same_draws(shards, generator, torch.device("cpu")):
                drawn.append(torch.rand(3, generator=generator).tolist())
        own = torch.tensor([float(rank)])
        taken = shards.take_from_main(own + 5).item()
        found[size] = place, drawn, taken, shards.average_over_data(own).item()
    with pytest.raises(ArgumentError, match="4 processes are no rows of as many"):
        vocab_mesh(3)
    found["all"] = vocab_mesh().shape
    return found


@pytest.fixture(scope="module")
def meshes():
    return in_processes(in_meshes, 4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_neighbours_hold_a_vocabulary_together(meshes, size):
    for rank, found in enumerate(meshes):
        place, _, taken, mean = found[size]
        assert place == (rank // size, rank % size, 4 // size, size)
        assert taken == 5  # the first of all
        column = torch.arange(rank % size, 4, size)
        assert mean == column.float().mean()
        assert found["all"] == (1, 4)


@pytest.mark.parametrize("size", [2, 4])
def test_a_group_draws_together_and_groups_draw_apart(meshes, size):
    of_groups = [[found[size][1] for found in meshes[first:][:size]] for first in range(0, 4, size)]
    for draws in of_groups:
        assert all(drawn == draws[0] for drawn in draws)
    firsts = [draws[0] for draws in of_groups]
    wanted = torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    assert firsts[0] == [wanted, wanted]  # as one process
    every = [tuple(drawn) for first in firsts for drawn in first]
    assert len(set(every)) == len(firsts)


# ------------------------------------------------------------------------------------ no processes


@pytest.mark.parametrize(("n_classes", "world_size"), [(103, 4), (7, 7), (10, 3), (64, 8)])
def test_every_class_has_one_owner(n_classes, world_size):
    of_ranks = [VocabShards(n_classes, rank, world_size) for rank in range(world_size)]
    ids = torch.arange(n_classes)
    held = torch.stack([shards.is_local(ids) for shards in of_ranks])
    assert torch.equal(held.sum(0), torch.ones(n_classes, dtype=torch.long))
    assert torch.equal(held.int().argmax(0), of_ranks[0].owners(ids))
    assert max(of_ranks[0].sizes) - min(of_ranks[0].sizes) <= 1
    assert sum(of_ranks[0].sizes) == n_classes


def test_a_process_on_its_own_holds_everything(inputs):
    hidden, weight, labels = inputs()
    shards = shard_classes(len(weight))
    rows = ShardedRows(DenseRows(weight), shards)
    assert (shards.first, shards.stop) == (0, len(weight))
    assert torch.equal(lookup(rows, labels), weight[labels])
    with torch.no_grad():
        assert torch.equal(streamed_topk(hidden, rows, 3)[1], streamed_topk(hidden, weight, 3)[1])
        assert torch.equal(
            label_rank(hidden, rows, labels)[0], label_rank(hidden, weight, labels)[0]
        )
