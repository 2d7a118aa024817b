"""The order of a stream, shared out and resumed."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_rece.data.prepared import RowGroup
from hf_rece.data.stream import SequenceStream
from hf_rece.errors import ArgumentError


def users(rows):
    return [row["user_id"] for row in rows]


def loaded(stream, n_workers, **settings):
    """The users of a DataLoader's batches."""
    loader = DataLoader(stream, batch_size=4, num_workers=n_workers, collate_fn=users, **settings)
    return [user for batch in loader for user in batch]


@pytest.fixture
def stream(prepared):
    return SequenceStream(prepared.split("train"), seed=1, buffer_size=16)


def test_every_row_comes_once_an_epoch(stream, prepared):
    rows = {row["user_id"]: row["item_ids"].tolist() for row in prepared.split("train")}
    streamed = list(stream)
    assert len(streamed) == len(stream) == len(rows)
    assert {row["user_id"]: row["item_ids"].tolist() for row in streamed} == rows


def test_each_epoch_and_each_seed_has_an_order_of_its_own(stream, prepared):
    orders = [users(stream)]
    stream.set_epoch(1)
    orders += [users(stream), users(SequenceStream(prepared.split("train"), seed=2))]
    orders += [users(SequenceStream(prepared.split("train"), shuffle=False))]
    assert len({tuple(order) for order in orders}) == 4
    assert users(prepared.split("train")) == orders[-1]
    stream.set_epoch(0)
    assert users(stream) == orders[0]


def test_neighbours_on_the_disk_are_torn_apart(prepared):
    on_disk = users(prepared.split("train"))
    place = {user: i for i, user in enumerate(on_disk)}
    places = np.array([place[user] for user in users(SequenceStream(prepared.split("train")))])
    assert (np.diff(places) == 1).mean() < 0.1


@pytest.mark.parametrize("buffer_size", [1, 5, 64, 1000])
def test_the_size_of_the_buffer_loses_no_row(prepared, buffer_size):
    split = prepared.split("train")
    assert sorted(users(SequenceStream(split, buffer_size=buffer_size))) == sorted(users(split))


def test_the_memory_of_a_stream_is_that_of_its_buffer(prepared, monkeypatch):
    live, read = [], RowGroup.read
    monkeypatch.setattr(RowGroup, "read", lambda group: live.append(group) or read(group))
    next(iter(SequenceStream(prepared.split("train"), buffer_size=1)))
    assert len(live) == 1


def test_workers_share_the_rows(stream):
    assert sorted(loaded(stream, 2)) == sorted(users(stream))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_the_rows(stream, world_size):
    parts = [users(stream.split_by_node(rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {-(-len(stream) // world_size)}
    assert {user for part in parts for user in part} == set(users(stream))
    assert sum(map(len, parts)) - len(stream) < world_size


def test_a_process_reads_its_own_part(prepared, monkeypatch):
    read, groups = RowGroup.read, []
    monkeypatch.setattr(RowGroup, "read", lambda group: groups.append(group) or read(group))
    list(SequenceStream(prepared.split("train")).split_by_node(1, 3))
    assert len(set(groups)) <= len(prepared.split("train").groups) // 3 + 2


@pytest.mark.parametrize("position", [0, 1, 15, 16, 37, 69, 70])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_goes_on_where_its_state_was_taken(stream, position, world_size):
    def part():
        return stream.split_by_node(world_size - 1, world_size)

    whole = part()
    whole.set_epoch(3)
    rows = iter(whole)
    position = min(position, len(whole))
    before = [next(rows) for _ in range(position)]
    state = whole.state_dict()
    resumed = part()
    resumed.load_state_dict(state)
    assert users(before) + users(resumed) == users(whole)
    assert users(resumed) == users(whole)  # the next epoch is whole again


def test_a_state_taken_before_the_first_row_is_the_one_that_was_loaded(stream):
    state = {"epoch": 2, "position": 41, "step": 1}
    stream.load_state_dict(state)
    assert stream.state_dict() == state
    wanted = users(stream)
    stream.load_state_dict(state)
    stream.load_state_dict(stream.state_dict())
    assert users(stream) == wanted
    assert len(wanted) == len(stream) - 41


def test_after_an_epoch_its_state_repeats_no_row(stream):
    assert len(users(stream)) == len(stream)
    at_end = stream.state_dict()
    stream.set_epoch(1)
    assert stream.state_dict() == {"epoch": 1, "position": 0, "step": 1}
    wanted = users(stream)
    stream.load_state_dict(at_end)
    assert users(stream) == []
    stream.set_epoch(1)
    assert users(stream) == wanted


def test_a_place_holds_for_its_epoch_alone(stream):
    stream.load_state_dict({"epoch": 0, "position": 60})
    stream.set_epoch(1)
    assert len(list(stream)) == len(stream)


def test_workers_share_what_is_left(stream):
    order = users(stream)
    stream.load_state_dict({"epoch": 0, "position": 41})
    assert sorted(loaded(stream, 2)) == sorted(order[41:])


def test_the_state_of_a_worker_is_for_as_many_workers(stream):
    stream.load_state_dict({"epoch": 0, "position": 4, "step": 2})
    with pytest.raises(ArgumentError, match="num_workers=1: the state is of 2"):
        next(iter(stream))


def test_what_is_before_the_place_is_not_read(prepared, monkeypatch):
    stream = SequenceStream(prepared.split("train"), buffer_size=8)
    stream.load_state_dict({"epoch": 0, "position": len(stream) - 3})
    read, groups = RowGroup.read, []
    monkeypatch.setattr(RowGroup, "read", lambda group: groups.append(group) or read(group))
    assert len(list(stream)) == 3
    assert len(groups) <= 2


def test_workers_that_stay_see_the_next_epoch(stream):
    loader = DataLoader(
        stream, batch_size=None, num_workers=1, persistent_workers=True, collate_fn=lambda row: row
    )
    first = users(loader)
    stream.set_epoch(1)
    second = users(loader)
    assert first != second == users(stream)


def test_a_stream_has_the_facts_of_its_log(stream, prepared):
    assert stream.info.description == prepared.description
    assert "70 users" in prepared.description


def test_bad_arguments_are_named(prepared, stream):
    with pytest.raises(ArgumentError, match="buffer_size=0"):
        SequenceStream(prepared.split("train"), buffer_size=0)
    with pytest.raises(ArgumentError, match="rank=2: there are 2"):
        stream.split_by_node(2, 2)


def test_states_are_plain_numbers(stream):
    rows = iter(stream)
    next(rows)
    assert stream.state_dict() == {"epoch": 0, "position": 1, "step": 1}
    assert not any(isinstance(value, torch.Tensor) for value in stream.state_dict().values())
