"""A tile of logits on the chip: how the kernels of triton_kernels.py read, make and drop it.

Of every kernel, `inputs` says what a logit is made of and `pairs` which pairs of a window are
scored. Shapes of a tile are (BLOCK_N tokens, BLOCK_M classes), or the reverse in `rows_kernel`,
so that what is known of tokens and of classes comes as columns and rows that broadcast.

Constants of compilation, in capitals:

    SUM                   merge="sum": softplus in place of exponentials
    SKIPS                 pairs to skip a token: few are unrolled, -1 reads their number
    EARLIER               earlier rounds
    BY_PLACE              rows are those of the window, in order, not the whole table
    OUT_BY_PLACE, ATOMIC  where gradients go, and whether several programs add to one place
    ONE                   BLOCK_D covers the width
    EVEN                  BLOCK_D divides the width
    UNIT                  a power of two that divides the width and the strides
    DOT, PRECISION        operands of the products
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # finite in bits too


class Inputs(NamedTuple):
    """What a logit is made of.

    Args:
        hidden: (N, D).
        rows: (C, D), or those of the window (n_groups * n_columns, D).
        bias: (C,) or None.
        hidden_stride: elements from one hidden state to the next; in a kernel, UNITs.
        rows_stride: elements from one row to the next; in a kernel, UNITs.
        n_tokens: N.
        n_classes: C.
        width: D; in a kernel, UNITs of it, by which the compiler knows how much to load at once.
        scale: logit_scale.
        softcap: c, or None for no cap.
    """

    hidden: Any
    rows: Any
    bias: Any
    hidden_stride: int
    rows_stride: int
    n_tokens: int
    n_classes: int
    width: int
    scale: float
    softcap: float | None

    @property
    def unit(self) -> int:
        """UNIT: at most what fits into the widest load."""
        return math.gcd(self.hidden_stride, self.rows_stride, self.width, 16)

    def in_units(self) -> Inputs:
        """Return what a kernel is passed."""
        return self._replace(
            hidden_stride=self.hidden_stride // self.unit,
            rows_stride=self.rows_stride // self.unit,
            width=self.width // self.unit,
        )


class Pairs(NamedTuple):
    """The pairs of a window: some groups of a grid, and some of their columns.

    Args:
        tokens: (G, n) integers; N pads.
        classes: (G, m) integers; C pads. None for class = column.
        used: (G,) int32, tokens of a group before those that only pad; None for n.
        token_log_weight: (G, n) or None.
        class_log_weight: (G, m) or None.
        own_labels: (N + 1,) int32 or None.
        blocked: (C,) int8, 1 for a class that is not scored, or None.
        skip: (n_skips, G * n) int32, columns to skip, -1 for none; or None.
        token_chunks: for each earlier round, (N + 1,) integers.
        class_chunks: for each earlier round, (C + 1,) integers.
        reach: for each earlier round, an integer.
        n_skips: length of `skip`.
        n_groups: G.
        n: tokens of a group.
        m: columns of the grid.
        first_group: of the window.
        first_column: of the window.
        n_columns: of the window.
    """

    tokens: Any
    classes: Any
    used: Any
    token_log_weight: Any
    class_log_weight: Any
    own_labels: Any
    blocked: Any
    skip: Any
    token_chunks: Any
    class_chunks: Any
    reach: Any
    n_skips: int
    n_groups: int
    n: int
    m: int
    first_group: int
    first_column: int
    n_columns: int


class Merged(NamedTuple):
    """What backward knows of the tokens.

    Args:
        shift: (N + 1,) float32, merged values; inf for the padding token.
        factor: (N + 1,) float32, gradient of the merged values, divided by the largest.
        unit: (1,) float32, multiplies every gradient: what `factor` was divided by, and the scale.
        winner: (N + 1,) int64, the group that a token's value comes from, or None.
        first_number: number of the grid's first group, counted over all grids.
    """

    shift: Any
    factor: Any
    unit: Any
    winner: Any
    first_number: int


# ----------------------------------------------------------------------------- reading the pairs


@triton.jit
def token_ids(inputs, pairs, group, place):
    """Ids of tokens; N pads."""
    at = tl.cast(group, tl.int64) * pairs.n + place
    token = tl.load(pairs.tokens + at, mask=place < pairs.n, other=inputs.n_tokens)
    return token.to(tl.int32)


@triton.jit
def class_ids(inputs, pairs, group, column):
    """Ids of the window's columns; C pads."""
    inside = column < pairs.n_columns
    if pairs.classes is None:
        ids = tl.where(inside, column + pairs.first_column, inputs.n_classes)
    else:
        at = tl.cast(group, tl.int64) * pairs.m + pairs.first_column + column
        ids = tl.load(pairs.classes + at, mask=inside, other=inputs.n_classes)
    return ids.to(tl.int32)


@triton.jit
def hidden_numbers(inputs, token):
    """Rows of hidden; padding reads the last, and whatever it scores weighs nothing."""
    return tl.minimum(token, inputs.n_tokens - 1).to(tl.int64)


@triton.jit
def row_numbers_of(inputs, pairs, group, column, ids, BY_PLACE: tl.constexpr):
    """Rows of the window's columns."""
    if BY_PLACE:
        first = tl.cast(group - pairs.first_group, tl.int64) * pairs.n_columns
        number = first + tl.minimum(column, pairs.n_columns - 1)
    else:
        number = tl.minimum(ids, inputs.n_classes - 1).to(tl.int64)
    return number


@triton.jit
def token_marks(inputs, pairs, group, place, token, SKIPS: tl.constexpr):
    """Own label and first column to skip of each token, read once for all its classes."""
    own = token * 0 - 1
    skip = own
    if pairs.own_labels is not None:
        own = tl.load(pairs.own_labels + token)
    if SKIPS != 0:
        at = tl.cast(group, tl.int64) * pairs.n + place
        skip = tl.load(pairs.skip + at, mask=place < pairs.n, other=-1)
    return own, skip


@triton.jit
def class_weights(inputs, pairs, group, column, ids):
    """What is added to all logits of a class: its log-weight, -inf for one that is not scored."""
    inside = ids < inputs.n_classes
    if pairs.blocked is not None:
        inside &= tl.load(pairs.blocked + ids, mask=inside, other=1) == 0
    weight = tl.where(inside, 0.0, -float("inf"))
    if pairs.class_log_weight is not None:
        at = tl.cast(group, tl.int64) * pairs.m + pairs.first_column + column
        weight += tl.load(pairs.class_log_weight + at, mask=inside, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _skip_one(scores, skip, column):
    return tl.where(skip == column, -float("inf"), scores)


@triton.jit
def drop(
    inputs, pairs, scores, group, place, token, marks, column, ids,
    SKIPS: tl.constexpr, EARLIER: tl.constexpr,
):  # fmt: skip
    """Set the pairs to -inf that the grid drops one by one."""
    own, skip = marks
    if pairs.own_labels is not None:
        scores = tl.where(own == ids, -float("inf"), scores)
    for r in tl.static_range(EARLIER):
        theirs = tl.load(pairs.class_chunks[r] + ids).to(tl.int32)
        distance = tl.abs(tl.load(pairs.token_chunks[r] + token).to(tl.int32) - theirs)
        scores = tl.where(distance <= pairs.reach[r], -float("inf"), scores)
    column += pairs.first_column
    if SKIPS != 0:
        scores = _skip_one(scores, skip, column)
    size = tl.cast(pairs.n_groups, tl.int64) * pairs.n
    at = pairs.skip + tl.cast(group, tl.int64) * pairs.n + place if SKIPS != 0 else 0
    if SKIPS < 0:
        for k in range(1, pairs.n_skips):
            more = tl.load(at + k * size, mask=place < pairs.n, other=-1)
            scores = _skip_one(scores, more, column)
    else:
        for k in tl.static_range(1, SKIPS):
            more = tl.load(at + k * size, mask=place < pairs.n, other=-1)
            scores = _skip_one(scores, more, column)
    return scores


# ------------------------------------------------------------------------------- making the logits


@triton.jit
def read(base, stride, number, at, width, EVEN: tl.constexpr, DOT: tl.constexpr):
    """A tile (rows, BLOCK_D): the columns `at` of the rows `number`."""
    pointers = base + number[:, None] * stride + at[None, :]
    tile = tl.load(pointers) if EVEN else tl.load(pointers, mask=at[None, :] < width, other=0.0)
    return tile.to(DOT)


@triton.jit
def products_of(
    left, left_stride, left_number, right, right_stride, right_number, width,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_L, BLOCK_R) float32 inner products, over the whole width."""
    products = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for start in range(0, width, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        left_tile = read(left, left_stride, left_number, at, width, EVEN, DOT)
        right_tile = read(right, right_stride, right_number, at, width, EVEN, DOT)
        products = tl.dot(left_tile, tl.trans(right_tile), products, input_precision=PRECISION)
    return products


@triton.jit
def _tanh(x):
    # Near zero, 1 - e cancels.
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(s < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to the last places where x is far below zero too."""
    e = tl.exp2(tl.abs(x) * -LOG2E)  # in [0, 1]
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), s at most 1/3
    t = s * s
    series = 1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def logits_of(inputs, products, ids):
    """Bias, scale and softcap."""
    logits = products * inputs.scale
    if inputs.bias is not None:
        bias = tl.load(inputs.bias + ids, mask=ids < inputs.n_classes, other=0.0)
        logits += bias.to(tl.float32) * inputs.scale
    if inputs.softcap is not None:
        logits = _tanh(logits / inputs.softcap) * inputs.softcap
    return logits


@triton.jit
def logit_grads(
    inputs, pairs, products, group, place, token, marks, known, column, ids,
    SUM: tl.constexpr, SKIPS: tl.constexpr, EARLIER: tl.constexpr,
):  # fmt: skip
    """Gradients of the products, but for `unit`."""
    shift, factor = known
    logits = logits_of(inputs, products, ids)
    scores = logits + class_weights(inputs, pairs, group, column, ids)
    scores = drop(
        inputs, pairs, scores, group, place, token, marks, column, ids, SKIPS, EARLIER
    )  # fmt: skip
    if SUM:
        e = tl.exp2(tl.abs(scores) * -LOG2E)
        share = tl.where(scores < 0, e, 1.0) / (1.0 + e)
    else:
        share = tl.exp2(scores * LOG2E - shift * LOG2E)
    if inputs.softcap is not None:
        capped = logits / inputs.softcap
        share *= 1.0 - capped * capped
    return share * factor


@triton.jit
def known_of(pairs, merged, group, place, token):
    """What to subtract from the logits of each token, and what to multiply its shares with."""
    shift = tl.load(merged.shift + token)
    if pairs.token_log_weight is not None:
        at = tl.cast(group, tl.int64) * pairs.n + place
        weight = tl.load(pairs.token_log_weight + at, mask=place < pairs.n, other=0.0)
        shift -= weight.to(tl.float32)
    if merged.winner is not None:
        number = group + merged.first_number
        shift = tl.where(tl.load(merged.winner + token) == number, shift, float("inf"))
    return shift, tl.load(merged.factor + token)


@triton.jit
def add(pointers, values, mask, ATOMIC: tl.constexpr):
    """Add values at pointers."""
    if ATOMIC:
        tl.atomic_add(pointers, values, mask=mask, sem="relaxed")
    else:
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)
