import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.embeddings.codes import _room, codes_from_log, distinct_codes
from hf_rece.errors import ArgumentError


@pytest.fixture
def train():
    """Two kinds of users, who take the items 1 to 40, or 41 to 80."""
    torch.manual_seed(1)
    histories = [(torch.randint(1, 41, (12,)) + 40 * (user % 2)).tolist() for user in range(200)]
    return Dataset.from_dict({"item_ids": histories})


@pytest.mark.parametrize("quantiser", ["quantile", "kmeans"])
def test_items_of_the_same_users_have_digits_in_common(train, quantiser):
    codes = codes_from_log(train, 81, (12, 12, 12), quantiser=quantiser)[1:]
    same = (codes.unsqueeze(0) == codes.unsqueeze(1)).float().mean(2)
    alike = (same[:40, :40].sum() + same[40:, 40:].sum()) / (2 * 40 * 40)
    assert float(alike) > 1.3 * float(same[:40, 40:].mean())


@pytest.mark.parametrize("quantiser", ["quantile", "kmeans"])
def test_no_code_occurs_twice(train, quantiser):
    codes = codes_from_log(train, 81, (10, 9), quantiser=quantiser)
    assert len(torch.unique(codes, dim=0)) == 81
    assert bool((codes.amax(0) < torch.tensor([10, 9])).all())


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 1000), min_size=2, max_size=60),
    share=st.floats(0.05, 1.5),
    exponent=st.floats(0, 3),
)
def test_room_fills_the_values_and_no_item_has_more_than_one(counts, share, exponent):
    weights = np.array(counts, dtype=float) ** exponent
    n_values = max(1, int(share * len(counts)))
    room = _room(weights, n_values)
    assert room.max() <= 1
    assert room.sum() == pytest.approx(min(n_values, len(counts)))
    shared = room < 1
    np.testing.assert_allclose(
        room[shared] * weights[shared].max(initial=0), room[shared].max(initial=0) * weights[shared]
    )


def test_popular_items_have_digits_of_their_own():
    histories = [[1, 2, 3 + user % 60, 3 + (7 * user) % 60] for user in range(300)]
    train = Dataset.from_dict({"item_ids": histories})
    codes = codes_from_log(train, 63, (12, 12))
    for item in (1, 2):
        assert int((codes == codes[item]).sum()) == 2  # its own two
    alike = codes_from_log(train, 63, (12, 12), popularity_exponent=0.0)
    assert int((alike == alike[1]).sum()) > 4


def test_one_seed_gives_one_code(train):
    first, again = (codes_from_log(train, 81, (10, 10), seed=3) for _ in range(2))
    assert torch.equal(first, again)


@settings(max_examples=50, deadline=None)
@given(
    radices=st.lists(st.integers(2, 5), min_size=2, max_size=4),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 9),
)
def test_equal_codes_are_told_apart(radices, share, seed):
    n_rows = max(1, int(share * torch.tensor(radices).prod()))
    codes = torch.stack([torch.randint(max(1, r // 2), (n_rows,)) for r in radices], dim=1)
    apart = distinct_codes(codes, radices, seed=seed)
    assert len(torch.unique(apart, dim=0)) == n_rows


def test_codes_that_differ_already_stay():
    codes = torch.tensor([[0, 1], [1, 0], [1, 1]])
    assert torch.equal(distinct_codes(codes, (2, 2)), codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radices": (9, 8)}, "cannot number 81 ids"),
        ({"radices": (2,) * 90}, "90, components wanted of 200 users and 81 items"),
        ({"radices": (9, 9), "quantiser": "pq"}, "quantiser='pq'"),
    ],
)
def test_bad_arguments_are_refused(train, arguments, message):
    with pytest.raises(ArgumentError, match=message.replace("90, ", "radices=90: ")):
        codes_from_log(train, 81, **arguments)
