"""Settings of item tables."""

import pytest

from hf_rece.embeddings.item_table import item_table_settings
from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.errors import ArgumentError


@pytest.mark.parametrize(
    ("item_embedding", "problem"),
    [
        ("lma", "names no table"),
        (["lma"], "names no table"),
        ({"type": ["lma"]}, "names no table"),
        ({"type": "hash"}, "names no table"),
        ({"compression": 4}, "names no table"),
        ({"type": "dense", "compression": 4}, "dense has no setting compression"),
        ({"type": "lma", "compression": "16"}, "compression is no '16'"),
        ({"type": "lma", "n_cells": 10.5}, "n_cells is no 10.5"),
        ({"type": "lma", "seed": True}, "seed is no True"),
        ({"type": "compositional", "radices": 15}, "radices is no 15"),
        ({"type": "compositional", "radices": [15, "2"]}, "radices is no"),
        ({"type": "compositional", "n_codes": 4.0}, "n_codes is no 4.0"),
        ({"type": "compositional", "operation": 3}, "operation is no 3"),
    ],
)
def test_bad_settings_are_named(item_embedding, problem):
    with pytest.raises(ArgumentError, match=f"item_embedding.*{problem}"):
        item_table_settings(item_embedding)


@pytest.mark.parametrize("n_keys", [-1, 9])
def test_a_number_of_keys_out_of_range_is_refused_at_once(n_keys):
    with pytest.raises(ArgumentError, match=f"n_keys={n_keys}"):
        LMAEmbedding(10, 4, compression=2, n_keys=n_keys)
