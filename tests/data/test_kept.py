"""What of a log is kept, against a plain sort."""

import numpy as np
import polars as pl
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_rece.data.kept import kept_places, value_at

INTEGERS = hnp.arrays(np.int64, st.integers(1, 40))
FLOATS = hnp.arrays(
    np.float64, st.integers(1, 40), elements=st.floats(allow_nan=False, allow_infinity=False)
)


@settings(deadline=None, max_examples=50)
@given(st.one_of(INTEGERS, FLOATS), st.floats(0.01, 0.99), st.integers(1, 5))
def test_the_value_at_a_place_is_that_of_sorted_values(values, quantile, n_parts):
    place = int((len(values) - 1) * quantile)
    found = value_at(lambda: iter(np.array_split(values, n_parts)), place)
    assert found == np.sort(values)[place]


@settings(deadline=None)
@given(st.integers(1, 1000), st.floats(0.01, 0.99))
def test_the_place_of_a_quantile_is_that_of_the_temporal_split(n, quantile):
    assert pl.Series(range(n)).quantile(quantile, "lower") == int((n - 1) * quantile)


def test_users_who_keep_too_little_keep_nothing():
    histories = pa.array([[0, 1, 1], [2, 0], [], [1, 1]], pa.list_(pa.int32()))
    places, lengths = kept_places(histories, np.array([True, True, False]), 2)
    assert places.tolist() == [True, True, True, False, False, True, True]
    assert lengths.tolist() == [3, 0, 0, 2]
