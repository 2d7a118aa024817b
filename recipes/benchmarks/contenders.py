"""Who computes the loss: dense, the peers, two oracles, and the losses of hf_rece.

    python recipes/benchmarks/losses.py --contenders dense torch_chunked liger cross_entropy

Each is a function of the same hidden states, output rows and labels. One that cannot run on a
machine says why, and stays in the table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from all_at_once import n_buckets_of_rece, rece_all_at_once, sce_all_at_once
from measuring import available_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from hf_rece.losses import LOSSES, build_loss

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
DENSE = "dense"
LABELS = {
    "torch_chunked": "torch linear_cross_entropy, options",
    "torch_chunked_256": "the same, 256 tokens a chunk",
    "torch_default": "torch linear_cross_entropy",
    "liger": "Liger",
    "cce": "Cut Cross-Entropy",
    "cce_exact": "Cut Cross-Entropy, exact",
    "cce_compile": "Cut Cross-Entropy, torch_compile",
    "trl": "TRL fused head",
    "oracle_rece": "RECE, all logits at once (oracle)",
    "oracle_sce": "SCE, all logits at once (oracle)",
}


@dataclass(frozen=True)
class Shape:
    """N tokens, C classes, D wide, of one dtype on one kind of device."""

    tokens: int
    classes: int
    width: int
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss.

    Args:
        make: returns the function; imports the package, which may be missing.
        exact: computes the cross-entropy over all classes.
        package: where it comes from, if not from torch or here.
        wants_cuda: has no other kernels.
        logits: returns the bytes alive at once beside inputs and gradients, about.
    """

    make: Callable[[], LossFunction]
    exact: bool = True
    package: str | None = None
    wants_cuda: bool = False
    logits: Callable[[Shape], float] = lambda shape: 0


def _dense() -> LossFunction:
    return lambda hidden, weight, labels: F.cross_entropy(hidden @ weight.T, labels)


def _torch(**options: int) -> LossFunction:
    chosen = nn.LinearCrossEntropyOptions(chunking_method=None if options else "auto", **options)
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, options=chosen
    )


def _liger() -> LossFunction:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def _cce(impl: str, **options: object) -> LossFunction:
    import cut_cross_entropy

    if impl == "cce_exact" and not hasattr(cut_cross_entropy.LinearCrossEntropyImpl, "CCE_EXACT"):
        # Releases on PyPI spell it so.
        impl, options = "cce", {"filter_eps": None}
    return lambda hidden, weight, labels: cut_cross_entropy.linear_cross_entropy(
        hidden, weight, labels, impl=impl, **options
    )


def _three_copies(shape: Shape) -> float:
    return 3.0 * shape.tokens * shape.classes * shape.itemsize


def _rece_logits(shape: Shape) -> float:
    n_chunks = n_buckets_of_rece(shape.tokens, shape.classes)
    met = 2 * 3 * -(-shape.classes // n_chunks)
    hashes = 2 * 4.0 * n_chunks * shape.classes
    return max(hashes, met * (60.0 * shape.tokens + 2 * n_chunks * shape.width * shape.itemsize))


def _sce_logits(shape: Shape) -> float:
    n_buckets = 2 * math.sqrt(shape.tokens)
    hashes = 2 * n_buckets * max(shape.classes, shape.tokens) * shape.itemsize
    gathered = 2 * n_buckets * (256 + n_buckets) * shape.width * shape.itemsize
    return max(hashes, gathered + 16 * n_buckets**2 * 257)


CONTENDERS: dict[str, Contender] = {
    DENSE: Contender(_dense, logits=_three_copies),
    "torch_default": Contender(lambda: F.linear_cross_entropy, logits=_three_copies),
    "torch_chunked": Contender(_torch),
    "torch_chunked_256": Contender(
        lambda: _torch(batch_chunk_size=256), logits=lambda s: 3 * 256 * s.classes * s.itemsize
    ),
    "liger": Contender(_liger, package="liger_kernel", wants_cuda=True),
    "cce": Contender(lambda: _cce("cce"), package="cut_cross_entropy", wants_cuda=True),
    "cce_exact": Contender(lambda: _cce("cce_exact"), package="cut_cross_entropy", wants_cuda=True),
    "cce_compile": Contender(
        lambda: _cce("torch_compile"), package="cut_cross_entropy", logits=_three_copies
    ),
    "oracle_rece": Contender(lambda: rece_all_at_once, exact=False, logits=_rece_logits),
    "oracle_sce": Contender(lambda: sce_all_at_once, exact=False, logits=_sce_logits),
    **{
        name: Contender(lambda name=name: build_loss(name), exact=name == "cross_entropy")
        for name in LOSSES
    },
}


def reason_not_to_run(name: str, shape: Shape, flops_per_second: float, limit: float) -> str | None:
    """Return why a contender would not run on this machine within `limit` seconds, or None.

    Memory: inputs, their gradients, new gradients, and what the contender says. Time: of the
    contenders that score all pairs, 8 N C D operations at the speed of a matrix product.
    """
    contender = CONTENDERS[name]
    package = contender.package
    if package and find_spec(package) is None:
        return f"not installed: pip install {package.replace('_', '-')}"
    if contender.wants_cuda and shape.device != "cuda":
        return "needs CUDA"
    rows = shape.tokens + shape.classes
    needed = 3 * rows * shape.width * shape.itemsize + contender.logits(shape)
    if needed > 0.85 * available_bytes(shape.device):
        return f"would need {needed / 2**30:,.0f} GiB"
    seconds = 8.0 * shape.tokens * shape.classes * shape.width / flops_per_second
    if contender.exact and seconds > limit:
        return f"would take {seconds / 60:,.0f} min or more"
    return None
