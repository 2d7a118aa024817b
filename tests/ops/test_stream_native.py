"""The C++ kernels against the torch backend; how they are compiled, and what happens if not."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.errors import ArgumentError
from hf_rece.losses import LOSSES
from hf_rece.losses.cross_entropy import cross_entropy_loss
from hf_rece.ops import lsh, native, stream_native, stream_torch
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.smaller_tiles import restore_tile_bytes
from hf_rece.ops.stream import choose_kernel
from hf_rece.ops.topk import streamed_topk
from tests.ops.every_kernel import (
    KNOBS,
    SHAPING,
    assert_same,
    compare,
    draw_case,
    loss_and_grads,
    run,
    tensors_of,
)

needs_kernels = pytest.mark.skipif(
    native.compiler() is None or sys.platform != "linux", reason="there is no C++ compiler"
)


@pytest.fixture
def fresh_library():
    """Forget which library this process has loaded, before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_every_loss_is_here():
    assert KNOBS.keys() == LOSSES.keys()


# ------------------------------------------------------------------------------------ same numbers


@needs_kernels
@pytest.mark.parametrize("shaping", [{}, SHAPING], ids=["plain", "shaped"])
@pytest.mark.parametrize("name", KNOBS)
def test_losses_equal_those_of_the_torch_backend(name, shaping):
    hidden, weight, labels, bias = tensors_of("cpu")
    # Observations are left to torch, and training asks for none.
    for observe in (False, True):
        own = bias if shaping else None
        assert_same(name, "native", hidden, weight, labels, own, observe=observe, **shaping)


@needs_kernels
@pytest.mark.parametrize("name", ["cross_entropy", "rece", "stratified"])
@pytest.mark.parametrize("width", [1, 64, 256])
def test_blocks_of_any_size(name, width):
    hidden, weight, labels, _ = tensors_of("cpu", n_tokens=600, n_classes=2500, width=width)
    scale = min(1, 4 / width**0.5)
    assert_same(name, "native", hidden, weight, labels, None, observe=False, logit_scale=scale)


@needs_kernels
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_plan(data):
    scores, plan, grad, wants = draw_case(data.draw)
    if not stream_native.serves(scores.hidden, scores.rows):
        return
    plain, fused = (
        run(kernel, scores, plan, grad, wants, observe=False)
        for kernel in (stream_torch, stream_native)
    )
    compare(plain, fused, plan.merge)


@needs_kernels
@pytest.mark.parametrize("name", ["cross_entropy", "rece", "sce", "stratified"])
def test_the_number_of_threads_changes_no_bit(name):
    tensors = tensors_of("cpu", n_tokens=300, n_classes=1500)
    before = torch.get_num_threads()
    try:
        results = []
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            results.append(loss_and_grads(name, "native", *tensors, observe=False))
    finally:
        torch.set_num_threads(before)
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@needs_kernels
def test_nan_is_not_lost():
    hidden, weight, labels, _ = tensors_of("cpu")
    poisoned = weight.detach().clone()
    poisoned[77] = torch.nan
    tensors = (hidden, poisoned, labels, None)
    losses = loss_and_grads("cross_entropy", "native", *tensors, observe=False)[0]
    assert losses[labels != -100].isnan().all()


@needs_kernels
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 40), st.integers(0, 1000))
def test_buckets_are_those_of_torch(n_vectors, n_buckets, width, seed):
    torch.manual_seed(seed)
    # Small integers: sums are exact, and ties are common.
    vectors, directions = (torch.randint(-2, 3, (n, width)).float() for n in (n_vectors, n_buckets))
    found = lsh.buckets(DenseRows(vectors), directions, 2**20)
    assert torch.equal(found.long(), (vectors @ directions.T).argmax(1))


@needs_kernels
@pytest.mark.parametrize("k", [1, 10, 200])
@pytest.mark.parametrize("n_queries", [1, 37, 300])
def test_the_search_finds_what_torch_finds(k, n_queries, monkeypatch):
    hidden, weight, bias = torch.randn(n_queries, 24), torch.randn(20_000, 24), torch.randn(20_000)
    seen = torch.randint(-1, 20_000, (n_queries, 50))
    excluded = torch.randint(20_000, (500,))
    wanted = (hidden @ weight.T + bias).index_fill_(1, excluded, -torch.inf)
    rows = torch.arange(n_queries).unsqueeze(1).expand_as(seen)
    wanted[rows[seen >= 0], seen[seen >= 0]] = -torch.inf
    served = []
    hits = native.search
    monkeypatch.setattr(native, "search", lambda *args: served.append(hits(*args)) or served[-1])
    scores, ids = streamed_topk(
        hidden, weight, k, bias=bias, seen_ids=seen, excluded_ids=excluded, tile_bytes=2**23
    )
    assert any(found is not None for found in served)
    best = wanted.topk(k)
    torch.testing.assert_close(scores, best.values)
    torch.testing.assert_close(wanted.gather(1, ids), best.values)


# ------------------------------------------------------------------------------------- the choice


@needs_kernels
def test_auto_on_a_cpu_takes_the_kernels():
    rows = DenseRows(torch.ones(3, 2))
    for backend in ("auto", "native"):
        assert choose_kernel(backend, torch.ones(2, 2), rows) is stream_native


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.ones(2, 2).double(), torch.ones(3, 2).double()),
        (torch.ones(2, 2).bfloat16(), torch.ones(3, 2).bfloat16()),
        (torch.ones(2, 300), torch.ones(3, 300)),
        (torch.ones(2, 3), torch.ones(3, 3).T),
    ],
    ids=["float64", "bfloat16", "wide", "transposed"],
)
@needs_kernels
def test_what_the_kernels_do_not_serve_is_left_to_torch(hidden, weight):
    assert not weight.is_contiguous() or not native.serves(hidden, weight)
    if weight.dtype != torch.float32 or weight.shape[1] > native.MAX_WIDTH:
        assert choose_kernel("native", hidden, DenseRows(weight)) is stream_torch


@needs_kernels
@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4, 1e6])
def test_a_wide_cap_costs_no_digits(softcap):
    hidden, weight = torch.randn(9, 5), torch.randn(70, 5)
    labels = torch.randint(70, (9,))
    native_loss, torch_loss = (
        cross_entropy_loss(
            hidden, weight, labels, logit_softcap=softcap, backend=backend, reduction="none"
        )
        for backend in ("native", "torch")
    )
    torch.testing.assert_close(native_loss, torch_loss, rtol=3e-6, atol=3e-6)


@pytest.mark.usefixtures("fresh_library")
def test_without_a_compiler_auto_takes_torch_and_native_says_why(monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    hidden, rows = torch.ones(2, 2), DenseRows(torch.ones(3, 2))
    assert choose_kernel("auto", hidden, rows) is stream_torch
    with pytest.raises(ArgumentError, match=r"backend='native'.*Install g\+\+"):
        choose_kernel("native", hidden, rows)


@needs_kernels
@pytest.mark.usefixtures("fresh_library")
def test_a_compiler_that_fails_is_told_once_and_torch_serves(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo no such flag >&2; exit 1; }\n')
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "compiler", lambda: str(broken))
    hidden, rows = torch.ones(2, 2), DenseRows(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="could not be compiled: no such flag"):
        assert choose_kernel("auto", hidden, rows) is stream_torch
    assert choose_kernel("auto", hidden, rows) is stream_torch  # no second warning
    assert not list((tmp_path / "cache" / "hf_rece").iterdir())


@needs_kernels
@pytest.mark.usefixtures("fresh_library")
def test_a_user_without_a_home_is_served_by_torch(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", homeless)
    with pytest.warns(UserWarning, match="home directory"):
        kernel = choose_kernel("auto", torch.ones(2, 2), DenseRows(torch.ones(3, 2)))
    assert kernel is stream_torch


@needs_kernels
@pytest.mark.usefixtures("fresh_library")
def test_kernels_are_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library() is not None
    (kept,) = (tmp_path / "hf_rece").iterdir()
    native.library.cache_clear()
    calls = []
    run_command = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda words, **rest: calls.append(words) or run_command(words, **rest)
    )
    assert native.library() is not None
    assert [words[1:] for words in calls] == [["--version"]]
    assert list((tmp_path / "hf_rece").iterdir()) == [kept]
    assert os.stat(tmp_path / "hf_rece").st_mode & 0o077 == 0


# ------------------------------------------------------------------------------------- no memory

HUGE = 2**44  # numbers, that no machine has room for


@needs_kernels
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("function", ["stream_forward", "stream_backward"])
def test_threads_that_find_no_memory_end_no_process(function, n_threads):
    tokens = torch.zeros(4, 300, dtype=torch.int32)
    sizes = {"n_tokens": 1, "n_classes": 1, "n_groups": 4, "n": 300, "m": 2000}
    struct = stream_native._Struct(
        tokens=native.pointer(tokens), width=HUGE, n_threads=n_threads, **sizes
    )
    nothing = [None] * {"stream_forward": 3, "stream_backward": 6}[function]
    with pytest.raises(MemoryError, match=f"not enough memory for {function}"):
        native.call(function, ctypes.byref(struct), *nothing)


@needs_kernels
def test_searches_that_find_no_memory_end_no_process():
    one, huge = ctypes.c_int64(1), ctypes.c_int64(HUGE)
    with pytest.raises(MemoryError):
        native.call("nearest", None, one, one, None, huge, None, one)
    with pytest.raises(MemoryError):
        native.call("search", None, huge, one, None, one, None, None, one, None, None, None, one)


@needs_kernels
@pytest.mark.parametrize("function", ["stream_forward", "stream_backward", "search"])
def test_kernels_that_find_no_memory_begin_again(function, monkeypatch):
    call, asked = native.call, []

    def starved(name, *arguments):
        asked.append(name)
        if asked.count(function) == 1 and name == function:
            raise MemoryError
        call(name, *arguments)

    hidden, weight, labels = torch.randn(60, 8), torch.randn(30_000, 8), torch.randint(900, (60,))

    def work():
        if function == "search":
            return streamed_topk(hidden, weight, 5)
        states = hidden.clone().requires_grad_()
        loss = cross_entropy_loss(states, weight, labels, backend="native")
        return loss.detach(), torch.autograd.grad(loss, states)[0]

    wanted = work()
    monkeypatch.setattr(native, "call", starved)
    with pytest.warns(UserWarning, match="out of memory"):
        found = work()
    restore_tile_bytes()
    assert asked.count(function) == 2
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
