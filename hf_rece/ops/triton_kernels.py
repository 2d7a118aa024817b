"""The kernels of stream_triton.py: a tile of logits is made, used and forgotten on the chip.

Arguments and constants are those of triton_tile.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_rece.ops.triton_tile import (
    LOG2E,
    LOWEST,
    add,
    class_ids,
    class_weights,
    drop,
    hidden_numbers,
    known_of,
    logit_grads,
    logits_of,
    products_of,
    read,
    row_numbers_of,
    softplus,
    token_ids,
    token_marks,
)


@triton.jit
def forward_kernel(
    inputs, pairs, values, n_splits, OBSERVE: tl.constexpr,
    SUM: tl.constexpr, SKIPS: tl.constexpr, EARLIER: tl.constexpr, BY_PLACE: tl.constexpr,
    ONE: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold a split of a group's columns into values (1 or 3, n_splits, window's groups, n).

    These are the merged value and, if observed, the largest and the mean logit without log-weights.
    Programs that run side by side read the same rows.
    """
    width = inputs.width * UNIT
    hidden_stride, rows_stride = inputs.hidden_stride * UNIT, inputs.rows_stride * UNIT
    n_blocks = tl.cdiv(pairs.n, BLOCK_N)
    program = tl.program_id(0)
    block, rest = program % n_blocks, program // n_blocks
    split, local = rest % n_splits, rest // n_splits
    group = local + pairs.first_group
    n_local = tl.num_programs(0) // n_blocks // n_splits
    places = block * BLOCK_N + tl.arange(0, BLOCK_N)
    place = places[:, None]
    token = token_ids(inputs, pairs, group, place)
    marks = token_marks(inputs, pairs, group, place, token, SKIPS)
    numbers = hidden_numbers(inputs, token_ids(inputs, pairs, group, places))
    at = tl.arange(0, BLOCK_D)
    if ONE:
        hidden = read(inputs.hidden, hidden_stride, numbers, at, width, EVEN, DOT)
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    length = tl.cdiv(tl.cdiv(pairs.n_columns, BLOCK_M), n_splits) * BLOCK_M
    start = split * length
    for first in range(start, tl.minimum(start + length, pairs.n_columns), BLOCK_M):
        columns = first + tl.arange(0, BLOCK_M)
        ids = class_ids(inputs, pairs, group, columns)
        row_numbers = row_numbers_of(inputs, pairs, group, columns, ids, BY_PLACE)
        column, classes = columns[None, :], ids[None, :]
        if ONE:
            rows = read(inputs.rows, rows_stride, row_numbers, at, width, EVEN, DOT)
            products = tl.dot(hidden, tl.trans(rows), input_precision=PRECISION)
        else:
            products = products_of(
                inputs.hidden, hidden_stride, numbers,
                inputs.rows, rows_stride, row_numbers, width,
                BLOCK_N, BLOCK_M, BLOCK_D, EVEN, DOT, PRECISION,
            )  # fmt: skip
        logits = logits_of(inputs, products, classes)
        scores = logits + class_weights(inputs, pairs, group, column, classes)
        scores = drop(
            inputs, pairs, scores, group, place, token, marks, column, classes, SKIPS, EARLIER
        )  # fmt: skip
        if OBSERVE:
            unweighted = tl.where(scores == -float("inf"), scores, logits)
            highest = tl.maximum(highest, tl.max(unweighted, 1))
        if SUM:
            total += tl.sum(softplus(scores), 1)
        else:
            # A finite floor in place of -inf keeps -inf minus the maximum from being NaN.
            risen = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2((top - risen) * LOG2E)
            share = tl.exp2(scores * LOG2E - (risen * LOG2E)[:, None])
            kept = total * shrink
            if OBSERVE:
                # From the maximum, as sums of logits themselves would lose places.
                weighted = weighted * shrink + kept * (top - risen)
                weighted += tl.sum(share * (logits - risen[:, None]), 1)
            total = kept + tl.sum(share, 1)
            top = risen
    result = total
    if not SUM:
        logarithm = top + tl.log(tl.where(total > 0, total, 1.0))
        result = tl.where(total > 0, logarithm, -float("inf"))
    at = values + (tl.cast(split, tl.int64) * n_local + local) * pairs.n + places
    tl.store(at, result, mask=places < pairs.n)
    if OBSERVE:
        size = tl.cast(n_splits, tl.int64) * n_local * pairs.n
        tl.store(at + size, highest, mask=places < pairs.n)
        average = top + weighted / tl.where(total > 0, total, 1.0)
        tl.store(at + 2 * size, average, mask=places < pairs.n)


@triton.jit
def hidden_kernel(
    inputs, pairs, merged, grad, n_splits,
    SUM: tl.constexpr, SKIPS: tl.constexpr, EARLIER: tl.constexpr, BY_PLACE: tl.constexpr,
    OUT_BY_PLACE: tl.constexpr, ATOMIC: tl.constexpr,
    ONE: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add to grad (N, D), or by place to grad (window's groups, n, D): a slice of D a program."""
    width = inputs.width * UNIT
    hidden_stride, rows_stride = inputs.hidden_stride * UNIT, inputs.rows_stride * UNIT
    n_blocks, n_slices = tl.cdiv(pairs.n, BLOCK_N), tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    block, rest = program % n_blocks, program // n_blocks
    piece, rest = rest % n_slices, rest // n_slices
    split, local = rest % n_splits, rest // n_splits
    group = local + pairs.first_group
    if pairs.used is not None:
        if block * BLOCK_N >= tl.load(pairs.used + group):
            return
    places = block * BLOCK_N + tl.arange(0, BLOCK_N)
    place = places[:, None]
    token = token_ids(inputs, pairs, group, place)
    tokens = token_ids(inputs, pairs, group, places)
    marks = token_marks(inputs, pairs, group, place, token, SKIPS)
    known = known_of(pairs, merged, group, place, token)
    numbers = hidden_numbers(inputs, tokens)
    at = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    if ONE:
        hidden = read(inputs.hidden, hidden_stride, numbers, at, width, EVEN, DOT)
    result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    length = tl.cdiv(tl.cdiv(pairs.n_columns, BLOCK_M), n_splits) * BLOCK_M
    start = split * length
    for first in range(start, tl.minimum(start + length, pairs.n_columns), BLOCK_M):
        columns = first + tl.arange(0, BLOCK_M)
        ids = class_ids(inputs, pairs, group, columns)
        row_numbers = row_numbers_of(inputs, pairs, group, columns, ids, BY_PLACE)
        rows = read(inputs.rows, rows_stride, row_numbers, at, width, EVEN, DOT)
        if ONE:
            products = tl.dot(hidden, tl.trans(rows), input_precision=PRECISION)
        else:
            products = products_of(
                inputs.hidden, hidden_stride, numbers,
                inputs.rows, rows_stride, row_numbers, width,
                BLOCK_N, BLOCK_M, BLOCK_D, EVEN, DOT, PRECISION,
            )  # fmt: skip
        grads = logit_grads(
            inputs, pairs, products, group, place, token, marks, known,
            columns[None, :], ids[None, :], SUM, SKIPS, EARLIER,
        )  # fmt: skip
        result = tl.dot(grads.to(DOT), rows, result, input_precision=PRECISION)
    if OUT_BY_PLACE:
        number = tl.cast(local, tl.int64) * pairs.n + places
    else:
        number = numbers
    mask = (tokens < inputs.n_tokens)[:, None] & (at < width)[None, :]
    pointers = grad + number[:, None] * width + at[None, :]
    add(pointers, result * tl.load(merged.unit), mask, ATOMIC)


@triton.jit
def rows_kernel(
    inputs, pairs, merged, grad, bias_grad, n_splits,
    SUM: tl.constexpr, SKIPS: tl.constexpr, EARLIER: tl.constexpr, BY_PLACE: tl.constexpr,
    OUT_BY_PLACE: tl.constexpr, ATOMIC: tl.constexpr,
    ONE: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add to grad (C, D), or by place to that of the window's rows; bias_grad is by place.

    Tiles are (BLOCK_M classes, BLOCK_N tokens), so that no operand of a product is turned over.
    """
    width = inputs.width * UNIT
    hidden_stride, rows_stride = inputs.hidden_stride * UNIT, inputs.rows_stride * UNIT
    n_blocks, n_slices = tl.cdiv(pairs.n_columns, BLOCK_M), tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    block, rest = program % n_blocks, program // n_blocks
    piece, rest = rest % n_slices, rest // n_slices
    split, local = rest % n_splits, rest // n_splits
    group = local + pairs.first_group
    columns = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = columns[:, None]
    ids = class_ids(inputs, pairs, group, columns)
    classes = class_ids(inputs, pairs, group, column)
    row_numbers = row_numbers_of(inputs, pairs, group, columns, ids, BY_PLACE)
    at = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    if ONE:
        rows = read(inputs.rows, rows_stride, row_numbers, at, width, EVEN, DOT)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bias_result = tl.zeros((BLOCK_M,), tl.float32)
    n_used = tl.cast(pairs.n, tl.int32)
    if pairs.used is not None:
        n_used = tl.load(pairs.used + group)
    length = tl.cdiv(tl.cdiv(n_used, BLOCK_N), n_splits) * BLOCK_N
    start = split * length
    for first in range(start, tl.minimum(start + length, n_used), BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        place = places[None, :]
        token = token_ids(inputs, pairs, group, place)
        numbers = hidden_numbers(inputs, token_ids(inputs, pairs, group, places))
        marks = token_marks(inputs, pairs, group, place, token, SKIPS)
        known = known_of(pairs, merged, group, place, token)
        hidden = read(inputs.hidden, hidden_stride, numbers, at, width, EVEN, DOT)
        if ONE:
            products = tl.dot(rows, tl.trans(hidden), input_precision=PRECISION)
        else:
            products = products_of(
                inputs.rows, rows_stride, row_numbers,
                inputs.hidden, hidden_stride, numbers, width,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN, DOT, PRECISION,
            )  # fmt: skip
        grads = logit_grads(
            inputs, pairs, products, group, place, token, marks, known,
            column, classes, SUM, SKIPS, EARLIER,
        )  # fmt: skip
        if grad is not None:
            result = tl.dot(grads.to(DOT), hidden, result, input_precision=PRECISION)
        if bias_grad is not None:
            bias_result += tl.sum(grads, 1)
    unit = tl.load(merged.unit)
    inside = (columns < pairs.n_columns) & (ids < inputs.n_classes)
    by_place = row_numbers_of(inputs, pairs, group, columns, ids, True)
    if grad is not None:
        number = by_place if OUT_BY_PLACE else ids.to(tl.int64)
        mask = inside[:, None] & (at < width)[None, :]
        add(grad + number[:, None] * width + at[None, :], result * unit, mask, ATOMIC)
    if bias_grad is not None:
        if piece == 0:
            add(bias_grad + by_place, bias_result * unit, inside, ATOMIC)


@triton.jit
def wide_kernel(
    inputs, pairs, merged, hidden_grad, grad, bias_grad,
    SUM: tl.constexpr, SKIPS: tl.constexpr, EARLIER: tl.constexpr, BY_PLACE: tl.constexpr,
    OUT_BY_PLACE: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both gradients from one tile of logits a program, BLOCK_D columns at a time.

    For widths at which making the logits twice costs more than adding by atomics. TURN blocks of
    tokens are served before the next block of classes, while their states are near.
    """
    width = inputs.width * UNIT
    hidden_stride, rows_stride = inputs.hidden_stride * UNIT, inputs.rows_stride * UNIT
    n_token_blocks = tl.cdiv(pairs.n, BLOCK_N)
    n_class_blocks = tl.cdiv(pairs.n_columns, BLOCK_M)
    program = tl.program_id(0)
    local = program // (n_token_blocks * n_class_blocks)
    inner = program % (n_token_blocks * n_class_blocks)
    turn = inner // (TURN * n_class_blocks)
    size = tl.minimum(n_token_blocks - turn * TURN, TURN)
    token_block = turn * TURN + (inner % (TURN * n_class_blocks)) % size
    class_block = (inner % (TURN * n_class_blocks)) // size
    group = local + pairs.first_group
    if pairs.used is not None:
        if token_block * BLOCK_N >= tl.load(pairs.used + group):
            return
    places = token_block * BLOCK_N + tl.arange(0, BLOCK_N)
    place = places[:, None]
    token = token_ids(inputs, pairs, group, place)
    tokens = token_ids(inputs, pairs, group, places)
    numbers = hidden_numbers(inputs, tokens)
    columns = class_block * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = class_ids(inputs, pairs, group, columns)
    row_numbers = row_numbers_of(inputs, pairs, group, columns, ids, BY_PLACE)
    products = products_of(
        inputs.hidden, hidden_stride, numbers,
        inputs.rows, rows_stride, row_numbers, width,
        BLOCK_N, BLOCK_M, BLOCK_D, EVEN, DOT, PRECISION,
    )  # fmt: skip
    grads = logit_grads(
        inputs, pairs, products, group, place, token,
        token_marks(inputs, pairs, group, place, token, SKIPS),
        known_of(pairs, merged, group, place, token),
        columns[None, :], ids[None, :], SUM, SKIPS, EARLIER,
    )  # fmt: skip
    unit = tl.load(merged.unit)
    real = tokens < inputs.n_tokens
    inside = (columns < pairs.n_columns) & (ids < inputs.n_classes)
    by_place = row_numbers_of(inputs, pairs, group, columns, ids, True)
    number = by_place if OUT_BY_PLACE else ids.to(tl.int64)
    if bias_grad is not None:
        add(bias_grad + by_place, tl.sum(grads, 0) * unit, inside, True)
    low = grads.to(DOT)
    turned = tl.trans(low)
    for start in range(0, width, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        within = (at < width)[None, :]
        if hidden_grad is not None:
            rows = read(inputs.rows, rows_stride, row_numbers, at, width, EVEN, DOT)
            result = tl.dot(low, rows, input_precision=PRECISION) * unit
            pointers = hidden_grad + numbers[:, None] * width + at[None, :]
            add(pointers, result, real[:, None] & within, True)
        if grad is not None:
            hidden = read(inputs.hidden, hidden_stride, numbers, at, width, EVEN, DOT)
            result = tl.dot(turned, hidden, input_precision=PRECISION) * unit
            pointers = grad + number[:, None] * width + at[None, :]
            add(pointers, result, inside[:, None] & within, True)
