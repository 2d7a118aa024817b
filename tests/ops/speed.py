"""The kernel's time beside a plain matrix product of as many operations: it must not get slower.

    pytest -n 0 tests/ops/speed.py

Bounds are several times what a quiet machine shows, lower where C++ kernels serve; both sides are
least times, taken in turn.
test_speed.py runs this file in a process of its own: pytest-benchmark measures in no other.
"""

import time

import pytest
import torch

from hf_rece.losses import build_loss
from hf_rece.losses.rece import RECEConfig, n_buckets_for
from hf_rece.ops import native

N, C, D = 1024, 20_000, 64


def tensors():
    hidden = torch.randn(N, D, requires_grad=True)
    weight = (0.1 * torch.randn(C, D)).requires_grad_()
    return hidden, weight, torch.randint(C, (N,))


def pairs_of(loss_type):
    """Scored (token, class) pairs."""
    if loss_type == "cross_entropy":
        return N * C
    if loss_type == "rece":
        config = RECEConfig(n_extra_chunks=1)
        return N * C * config.n_rounds * 3 // n_buckets_for(config, N, C)
    return N * 512  # stratified: hard and random classes of a token


def seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


# With C++ kernels, and with torch alone.
AT_MOST = {"cross_entropy": (3, 10), "rece": (10, 40), "stratified": (30, 80)}


@pytest.mark.parametrize("loss_type", AT_MOST)
def test_a_loss_takes_a_few_times_a_plain_product(benchmark, loss_type):
    hidden, weight, labels = tensors()
    loss = build_loss(loss_type)
    # Forward, its repetition and two gradients: four products of the pairs by D.
    columns = 4 * pairs_of(loss_type) // N
    product = torch.randn(N, D), torch.randn(D, columns)
    products = []

    def setup():
        hidden.grad = weight.grad = None
        products.append(seconds(lambda: product[0] @ product[1]))

    benchmark.pedantic(
        lambda: loss(hidden, weight, labels).backward(), setup=setup, rounds=8, warmup_rounds=1
    )
    ratio = benchmark.stats.stats.min / min(products[1:])
    benchmark.extra_info["over_product"] = round(ratio, 2)
    assert ratio < AT_MOST[loss_type][native.library() is None]
