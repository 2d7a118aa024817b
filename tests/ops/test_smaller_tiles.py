"""A tile that does not fit into memory, once and twice."""

import subprocess
import sys
from typing import get_args

import pytest
import torch

from hf_rece.losses import LossName, build_loss
from hf_rece.ops import lsh, native, stream_torch, topk
from hf_rece.ops.plans import stratified
from hf_rece.ops.smaller_tiles import restore_tile_bytes
from hf_rece.ops.topk import label_rank, streamed_topk

TILE = 40_000
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
PRODUCTS = [
    (stream_torch, "batched_product"),
    (stream_torch, "batched_transposed_product"),
    (topk, "product"),
    (lsh, "product"),
]


@pytest.fixture(autouse=True)
def _no_native(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    yield
    restore_tile_bytes()


class Products:
    """Counts the matrix products of tiles, and lets some of them fail."""

    def __init__(self, monkeypatch, failing=(), error=None):
        self.count, self.failing = 0, failing
        self.error = torch.OutOfMemoryError("CUDA out of memory") if error is None else error
        for module, name in PRODUCTS:
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, product):
        def counting(*args):
            self.count += 1
            if self.count in self.failing:
                raise self.error
            return product(*args)

        return counting


def step(name, inputs):
    torch.manual_seed(0)
    hidden, weight, labels = inputs(n_tokens=90, n_classes=900, width=6)
    loss = build_loss(name, tile_bytes=TILE, backend="torch")(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def products_of(name, inputs):
    with pytest.MonkeyPatch.context() as patch:
        products = Products(patch)
        step(name, inputs)
    return products.count


@pytest.mark.parametrize("error", [None, RuntimeError(CPU)], ids=["cuda", "cpu"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("name", get_args(LossName))
def test_a_step_that_runs_out_of_memory_once_counts_nothing_twice(
    name, place, error, inputs, monkeypatch
):
    wanted, n_products = step(name, inputs), products_of(name, inputs)
    assert n_products > 2
    Products(monkeypatch, failing={1 + round(place * (n_products - 1))}, error=error)
    with pytest.warns(UserWarning, match=f"tile_bytes={TILE}: going on with {TILE // 2}"):
        found = step(name, inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
    step(name, inputs)  # begins with what fitted: no warning, which would be an error


def test_the_overlaps_of_strata_are_looked_for_again(inputs, monkeypatch):
    wanted, find, sizes = step("stratified", inputs), stratified._find_hits, []

    def too_large(*args):
        sizes.append(args[-1])
        if args[-1] == TILE:
            raise MemoryError
        return find(*args)

    monkeypatch.setattr(stratified, "_find_hits", too_large)
    with pytest.warns(UserWarning, match="out of memory"):
        found = step("stratified", inputs)
    assert sizes == [TILE, TILE // 2]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_tiles_may_be_large_again(inputs, monkeypatch):
    Products(monkeypatch, failing={1})
    with pytest.warns(UserWarning, match="all later steps"):
        step("cross_entropy", inputs)
    restore_tile_bytes()
    Products(monkeypatch, failing={1})
    with pytest.warns(UserWarning, match=f"tile_bytes={TILE}"):
        step("cross_entropy", inputs)


def test_backward_begins_with_the_tiles_that_fitted_forward(inputs, monkeypatch):
    Products(monkeypatch, failing={1})
    with pytest.warns(UserWarning, match="out of memory") as caught:
        step("cross_entropy", inputs)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("failing", [{1, 2}, {1, 3}, {4, 6}])
def test_the_second_time_is_an_error(failing, inputs, monkeypatch):
    Products(monkeypatch, failing=failing)
    with pytest.raises(torch.OutOfMemoryError):
        step("cross_entropy", inputs)


def test_other_errors_are_not_tried_again(inputs, monkeypatch):
    products = Products(monkeypatch, failing={1}, error=RuntimeError("not about memory"))
    with pytest.raises(RuntimeError, match="not about memory"):
        step("cross_entropy", inputs)
    assert products.count == 1


@pytest.mark.parametrize("search", ["topk", "rank"])
def test_searches_begin_again(search, monkeypatch):
    hidden, weight = torch.randn(300, 6), torch.randn(2000, 6)
    labels = torch.randint(2000, (300,))

    def run():
        if search == "topk":
            return streamed_topk(hidden, weight, 5, tile_bytes=TILE)
        return label_rank(hidden, weight, labels, tile_bytes=TILE)

    wanted = run()
    Products(monkeypatch, failing={2})
    with pytest.warns(UserWarning, match="out of memory"):
        found = run()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


REAL = """
import resource, warnings
import torch
from pathlib import Path
from hf_rece import cross_entropy_loss
torch.set_num_threads(1)
hidden = torch.randn(8192, 8, requires_grad=True)
weight = torch.randn(60_000, 8, requires_grad=True)
labels = torch.randint(60_000, (8192,))
cross_entropy_loss(hidden, weight, labels, tile_bytes=2**20, backend="torch").backward()
wanted = weight.grad.clone()
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 1300 * 2**20,) * 2)
weight.grad = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cross_entropy_loss(hidden, weight, labels, tile_bytes=2**30, backend="torch").backward()
assert ["out of memory" in str(w.message) for w in caught] == [True], caught
torch.testing.assert_close(weight.grad, wanted)
"""


@pytest.mark.slow
def test_a_process_that_may_have_no_more_memory_goes_on():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
