"""What is prepared on disk is what load_interactions and the splits give, or both refuse."""

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

from hypothesis import strategies as st

from hf_rece.data.interactions import k_core_filter, load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.prepare import prepare_log
from hf_rece.data.splits import leave_one_out_split, temporal_split
from hf_rece.errors import HfReceError
from tests.fuzz import logs
from tests.fuzz.cases import cases

WRITERS = {
    "csv": lambda log: logs.to_csv(log, ",", "\n", False),
    "tsv": lambda log: logs.to_csv(log, "\t", "\r\n", True),
    "jsonl": logs.to_json_lines,
    "parquet": logs.to_parquet,
}
# What may take the place of some bytes of a file.
JUNK = (
    b"\xff",
    b"\0",
    b'"',
    b",",
    b"\n",
    b"nan",
    b"null",
    b"",
    b"1.5",
    b"-",
    b"99999999999999999999",
)


@st.composite
def prepared_logs(draw):
    """A log in one or two files of one format, now and then damaged, and the settings."""
    kind = draw(st.sampled_from(list(WRITERS)))
    log, files = draw(logs.rows()), []
    n_files = draw(st.integers(1, 2))
    for part in range(n_files):
        whole = WRITERS[kind]([column[part::n_files] for column in log])
        if draw(st.sampled_from([False, False, False, True])):
            place = draw(st.integers(0, len(whole)))
            drop = draw(st.sampled_from([0, 0, 1, 2, 7, 10**6]))
            whole = whole[:place] + draw(st.sampled_from(JUNK)) + whole[place + drop :]
        files.append(whole)
    return kind, files, {
        "split": draw(st.sampled_from(["leave_one_out", "temporal"])),
        "quantile": 0.6,
        "min_user_interactions": draw(st.integers(0, 3)),
        "min_item_interactions": draw(st.integers(0, 2)),
        "n_shards": draw(st.integers(1, 3)),
    }  # fmt: skip


def in_memory(files, settings):
    """Items by token id, and the rows of each split."""
    interactions = k_core_filter(
        load_interactions(files),
        min_user_interactions=settings["min_user_interactions"],
        min_item_interactions=settings["min_item_interactions"],
    )
    tokenizer = ItemTokenizer.from_interactions(interactions)
    if settings["split"] == "temporal":
        splits = temporal_split(interactions, tokenizer, quantile=settings["quantile"])
    else:
        splits = leave_one_out_split(interactions, tokenizer)
    return tokenizer.items, {name: rows_of(part) for name, part in splits.items()}


def on_disk(files, settings, folder):
    prepared = prepare_log(files, folder / "prepared", **settings)
    splits = ("train", "validation", "test")
    return prepared.tokenizer.items, {name: rows_of(prepared.split(name)) for name in splits}


def rows_of(part):
    return sorted((row["user_id"], [*row["item_ids"]], row.get("target_id")) for row in part)


@cases(25, prepared_logs())
def test_what_is_prepared_is_what_is_loaded(case):
    kind, contents, settings = case
    # Nothing is killed here, and half the time would go by waiting for the disk.
    with tempfile.TemporaryDirectory() as name, patch.object(os, "fsync"):
        folder = Path(name)
        files = [folder / f"{number}.{kind}" for number in range(len(contents))]
        for path, content in zip(files, contents, strict=True):
            path.write_bytes(content)
        found = []
        for way in (lambda: in_memory(files, settings), lambda: on_disk(files, settings, folder)):
            try:
                found.append(way())
            except HfReceError:
                found.append(None)
    assert found[0] == found[1]
