import math

import numpy as np
import pytest
import torch

from hf_rece.embeddings.lma import LMAEmbedding, _hash_functions
from hf_rece.embeddings.min_hash import min_hash_signatures
from hf_rece.embeddings.mixing import mix
from hf_rece.errors import ArgumentError
from hf_rece.ops.rows import OutputRows

FIXED = {
    0: [[655, 20, 273], [85, 423, 539], [224, 409, 741]],
    3: [[424, 452, 750], [537, 346, 882], [587, 667, 728]],
}


def users_of_two_items(jaccard, n_users=4000):
    """One batch in which items 0 and 1 have sets of users with this Jaccard similarity."""
    both = round(n_users * jaccard)
    users = np.arange(n_users)
    first = users[: both + (n_users - both) // 2]
    second = np.concatenate([users[:both], users[len(first) :]])
    ids = np.repeat([0, 1], [len(first), len(second)])
    return ids, mix(np.concatenate([first, second]).astype(np.uint64))


def addresses(table):
    """Every cell again, in Python's own integers."""
    choices, factors, offsets = (
        t.tolist()
        for t in _hash_functions(
            table.n_keys, table.n_hashes, table.width, table.seed, torch.device("cpu")
        )
    )
    cells = []
    for number in range(table.n_rows):
        row = []
        for i in range(table.width):
            if table.signatures is not None:
                keys = table.signatures[number].tolist()
                product = sum(
                    key * int(of_key[i]) for key, of_key in zip(keys, choices, strict=True)
                )
            else:
                product = number
            total = offsets[i] + product * factors[i]
            row.append((((total % 2**64) >> 33) * table.n_cells) >> 31)
        cells.append(row)
    return torch.tensor(cells)


@pytest.mark.parametrize("n_keys", [0, 3, 8])
def test_rows_and_gradients_are_those_of_a_dense_oracle(n_keys):
    table = LMAEmbedding(50, 6, compression=4, n_keys=n_keys, std=1.0)
    cells = addresses(table)
    torch.testing.assert_close(table.cells(torch.arange(50)), cells, rtol=0, atol=0)
    ids, direction = torch.tensor([0, 49, 3, 3]), torch.randn(4, 6)
    torch.testing.assert_close(table(ids), table.memory[cells[ids]], rtol=0, atol=0)
    (own,) = torch.autograd.grad((table(ids) * direction).sum(), table.memory)
    (dense,) = torch.autograd.grad((table.memory[cells[ids]] * direction).sum(), table.memory)
    torch.testing.assert_close(own, dense, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table.rows(slice(7, 50)), table.memory[cells[7:50]])


@pytest.mark.parametrize("jaccard", [0.2, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("n_hashes", [1, 2])
def test_items_share_cells_in_proportion_to_their_similarity(jaccard, n_hashes):
    n_seeds, width = 150, 64
    shared = []
    for seed in range(n_seeds):
        signatures = min_hash_signatures([users_of_two_items(jaccard)], 2, n_keys=8, seed=seed)
        table = LMAEmbedding(
            2, width, n_cells=2**20, signatures=signatures, n_hashes=n_hashes, seed=seed
        )
        cells = table.cells(slice(0, 2))
        shared.append(float((cells[0] == cells[1]).float().mean()))
    # The eight keys are drawn once a seed: their mean is what varies.
    # One key is set apart where all eight agree.
    expected = jaccard**n_hashes - n_hashes / 8 * jaccard**8
    deviation = n_hashes * math.sqrt(expected * (1 - expected) / (8 / n_hashes) / n_seeds)
    assert np.mean(shared) == pytest.approx(expected, abs=4 * deviation)


def test_items_without_a_log_share_by_chance_alone():
    table = LMAEmbedding(400, 64, n_cells=1000, n_keys=4)
    cells = table.cells(slice(0, 400))
    same = float((cells[:200] == cells[200:]).float().mean())
    assert same == pytest.approx(1 / 1000, abs=5 * math.sqrt(1e-3 / (200 * 64)))


def test_all_of_the_memory_is_used():
    table = LMAEmbedding(20_000, 16, n_cells=5000, n_keys=4)
    used = torch.bincount(table.cells(slice(0, 20_000)).view(-1), minlength=5000)
    assert len(used) == 5000
    # 64 addresses a cell, Poisson.
    assert int(used.min()) > 20
    assert int(used.max()) < 120


@pytest.mark.parametrize("n_keys", [0, 3])
def test_hash_functions_never_change(n_keys):
    table = LMAEmbedding(10**6, 3, n_cells=1000, seed=7, n_keys=n_keys)
    assert table.cells(torch.tensor([0, 1, 999_999])).tolist() == FIXED[n_keys]


def test_is_a_table_of_output_rows():
    assert isinstance(LMAEmbedding(60, 7, compression=3), OutputRows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "compression=None.*exactly one"),
        ({"compression": 2, "n_cells": 5}, "exactly one"),
        ({"compression": 0.5}, "compression=0.5: a memory of 0 cells"),
        ({"n_cells": 0}, "n_cells=0"),
        ({"compression": 2, "n_keys": 2, "n_hashes": 3}, "n_hashes=3.*2 keys"),
        ({"compression": 2, "signatures": torch.zeros(60, 4)}, "signatures=.*int16"),
        (
            {"compression": 2, "signatures": torch.zeros(59, 4, dtype=torch.int16)},
            "there are 60 ids",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        LMAEmbedding(60, 3, **arguments)


def test_signatures_are_replaced_only_where_there_are_some():
    signatures = torch.ones(60, 4, dtype=torch.int16)
    table = LMAEmbedding(60, 3, compression=2, n_keys=4)
    table.set_signatures(signatures)
    assert torch.equal(table.signatures, signatures)
    with pytest.raises(ArgumentError, match=r"\(60, 4\)"):
        table.set_signatures(signatures[:, :3])
    with pytest.raises(ArgumentError, match="hashes ids"):
        LMAEmbedding(60, 3, compression=2).set_signatures(signatures)


def test_a_table_without_storage_takes_no_memory():
    with torch.device("meta"):
        table = LMAEmbedding(10**12, 8, n_cells=10, n_keys=2)
    assert table.signatures.shape == (10**12, 2)
