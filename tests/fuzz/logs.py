"""Logs in any format, written well or broken, and what they say, in plain Python."""

import csv
import io
import json
import math
import re
from collections import Counter
from datetime import datetime, timedelta, timezone

import polars as pl
from hypothesis import strategies as st

COLUMNS = ("user_id", "item_id", "timestamp")
words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1, max_size=6
).filter(lambda word: word.strip() == word)
integers = st.integers(-3, 12) | st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, -(2**63)])
odd_words = st.sampled_from(["007", "7", "-0", "+7", "1.0", "1e3", "nan", "inf", "null", "NA", "é"])
odd_words |= st.sampled_from(['"', "a,b", "a\tb", "a;b", "'", "9223372036854775808", "[PAD]"])
ids = st.sampled_from(["integers", "words"]).flatmap(
    lambda kind: (
        st.lists(integers, min_size=1, max_size=6)
        if kind == "integers"
        else st.lists(words | odd_words, min_size=1, max_size=6)
    )
)
clocks = st.sampled_from(["integers", "floats", "dates", "nanoseconds"])
START = datetime(2024, 5, 31, 12, tzinfo=timezone.utc)


@st.composite
def rows(draw):
    """A log as lists of users, items and times: integers or words, and one kind of times."""
    users, items, clock = draw(ids), draw(ids), draw(clocks)
    n_rows = draw(st.integers(1, 30))
    ticks = st.integers(0, 20)
    time_of = {
        "integers": lambda t: t,
        "floats": lambda t: t + 0.5,
        "dates": lambda t: START + timedelta(seconds=t),
        "nanoseconds": lambda t: 1_700_000_000_000_000_000 + t,
    }[clock]
    return (
        [draw(st.sampled_from(users)) for _ in range(n_rows)],
        [draw(st.sampled_from(items)) for _ in range(n_rows)],
        [time_of(draw(ticks)) for _ in range(n_rows)],
    )


def as_text(value):
    return value.isoformat() if isinstance(value, datetime) else str(value)


def to_csv(log, separator, line_end, bom):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=line_end)
    writer.writerow(COLUMNS)
    writer.writerows([as_text(value) for value in row] for row in zip(*log, strict=True))
    return ("\ufeff" * bom + text.getvalue()).encode()


def to_parquet(log):
    buffer = io.BytesIO()
    pl.DataFrame(dict(zip(COLUMNS, log, strict=True)), strict=False).write_parquet(buffer)
    return buffer.getvalue()


def to_json_lines(log):
    rows = (dict(zip(COLUMNS, row, strict=True)) for row in zip(*log, strict=True))
    lines = (json.dumps(row, default=as_text, ensure_ascii=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


# -------------------------------------------------------------------------------- what they mean


def ids_of_text(values):
    """Integers if all are written as integers are."""
    plain = all(re.fullmatch(r"0|-?[1-9][0-9]*", value) for value in values)
    numbers = [int(value) for value in values] if plain else []
    fit = plain and all(-(2**63) <= number < 2**63 for number in numbers)
    return numbers if fit else list(values)


def microseconds(time):
    if not isinstance(time, datetime):
        return time
    return (time - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)


def meaning(log, is_text):
    """Rows (user, item, time) as load_interactions should return them."""
    users, items, times = log
    if is_text:
        users, items = (ids_of_text([str(value) for value in part]) for part in (users, items))
    table = list(zip(users, items, map(microseconds, times), strict=True))
    return sorted(table, key=lambda row: (row[0], row[2]))


def tokens_of(table):
    """Item -> token, the most popular first, ties by item."""
    counts = Counter(item for _, item, _ in table)
    ordered = sorted(counts, key=lambda item: (-counts[item], item))
    return {item: token for token, item in enumerate(ordered, start=1)}


def sequences_of(table, token_of):
    sequences = {}
    for user, item, _ in table:
        sequences.setdefault(user, []).append(token_of[item])
    return sequences


def leave_one_out(table):
    """The three parts as lists of (user, history, target), or None where one is empty."""
    sequences = sequences_of(table, tokens_of(table))
    held = {user: tokens for user, tokens in sequences.items() if len(tokens) >= 3}
    train = [(user, tokens[:-2]) for user, tokens in held.items() if len(tokens) >= 4]
    train += [(user, tokens) for user, tokens in sequences.items() if len(tokens) == 2]
    return parts(train, held)


def temporal(table, quantile):
    sequences = sequences_of(table, tokens_of(table))
    times = sorted(time for _, _, time in table)
    point = times[math.floor((len(times) - 1) * quantile)]
    late = {user for user, _, time in table if time > point}
    held = {u: tokens for u, tokens in sequences.items() if u in late and len(tokens) >= 3}
    train = [(u, tokens) for u, tokens in sequences.items() if u not in late and len(tokens) >= 2]
    return parts(train, held)


def parts(train, held):
    if not train or not held:
        return None
    return {
        "train": sorted(train),
        "validation": sorted((u, tokens[:-2], tokens[-2]) for u, tokens in held.items()),
        "test": sorted((u, tokens[:-1], tokens[-1]) for u, tokens in held.items()),
    }
