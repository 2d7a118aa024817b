"""Bucket, sort, chunk."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rece.ops.lsh import buckets, random_directions, sort_into_chunks
from hf_rece.ops.rows import DenseRows


def test_a_bucket_is_the_closest_direction():
    vectors, directions = torch.randn(500, 6), torch.randn(9, 6)
    found = buckets(DenseRows(vectors), directions, tile_bytes=1)
    assert torch.equal(found.long(), (vectors @ directions.T).argmax(1))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 70))
def test_chunks_cut_the_stable_order(bucket_list, n_chunks):
    bucket_of = torch.tensor(bucket_list, dtype=torch.int16)
    chunks = sort_into_chunks(bucket_of, n_chunks)
    order = sorted(range(len(bucket_list)), key=lambda i: bucket_list[i])
    assert chunks.order.tolist() == order
    table = chunks.table(padding=-1)
    assert table.shape[0] == n_chunks
    assert [i for i in table.flatten().tolist() if i >= 0] == order
    for number, row in enumerate(table.tolist()):
        for i in row:
            assert i < 0 or chunks.numbers()[i] == number


def test_directions_follow_the_generator():
    one, other = (random_directions(3, torch.ones(1, 5), torch.Generator()) for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == (3, 5)
