"""Damage that is done to files and settings."""

import copy
import json
import math

from hypothesis import strategies as st

# What JSON and YAML can say in place of a number, a flag or a name.
plain = st.sampled_from(
    [
        *(None, True, False, 0, 1, 2, 3, 7, -1, 2.0, 0.5, -0.5, 1e-9, math.inf, math.nan),
        *("", "auto", "mean", "cross_entropy", "rece", "2GiB", "3", "uniform", "dense", "é", "lma"),
        *("sdpa", "org/kernel", "float32"),
        *([], {}, [1], [1, 2], ["a"], {"type": "lma"}, {"a": 1}, [None], [[1]]),
    ]
)
# Numbers so large that whatever takes them at their word never ends, or takes all memory.
huge = st.sampled_from([10**9, 10**12, 2**31, 2**63, -(2**63), 10**30, 1e18, 1e308])


def paths_of(value, prefix=()):
    """Every place in nested dictionaries."""
    for key, inner in value.items():
        yield (*prefix, key)
        if isinstance(inner, dict):
            yield from paths_of(inner, (*prefix, key))


@st.composite
def changed(draw, settings, values=plain):
    """The same settings with one to three of them replaced, dropped or added."""
    settings = json.loads(json.dumps(settings))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(paths_of(settings), key=str)))
        inner = settings
        for key in path[:-1]:
            inner = inner[key]
        kind = draw(st.sampled_from(["replace"] * 6 + ["drop", "add"]))
        if kind == "drop":
            del inner[path[-1]]
            if not settings:
                break
        else:
            inner[path[-1] if kind == "replace" else "unknown"] = copy.deepcopy(draw(values))
        if not any(True for _ in paths_of(settings)):
            break
    return settings


def damaged(whole, damage):
    kind, where, put = damage
    if kind == "settings":
        return json.dumps(with_change(json.loads(whole), where, copy.deepcopy(put))).encode()
    place = int(where * len(whole))
    if kind == "flip":
        return whole[:place] + bytes([whole[place] ^ (1 << put[0] % 8)]) + whole[place + 1 :]
    return {
        "cut": whole[:place], "insert": whole[:place] + put + whole[place:], "empty": b""
    }[kind]  # fmt: skip


def with_change(settings, choose, put):
    """JSON with one value of it replaced."""
    if not isinstance(settings, dict | list) or not settings:
        return put
    inner, path = settings, []
    while isinstance(inner, dict | list) and inner:
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        path.append(choose.choice(list(keys)))
        inner = inner[path[-1]]
        if choose.random() < 0.3:
            break
    target = settings
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = put
    return settings
