"""What a training step should cost on many devices: bytes, seconds and messages, from its shape.

    python recipes/benchmarks/scale.py      # prints, keeps and draws what this works out

What a loss keeps and multiplies is hf_rece.losses' own estimate. Here is added what lies around it:
the table and its optimiser, rows that are read at random, and messages between processes. Speeds of
this machine's processor are fitted to steps that were measured here; those of GPUs are a share of
what their data sheets promise. ASSUMPTIONS says what is left out.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_rece.embeddings.compositional import resolve_radices
from hf_rece.embeddings.digits import narrowest
from hf_rece.losses import LOSSES
from hf_rece.losses.estimates import Estimate, Shape, dense_estimate
from hf_rece.losses.options import SPARSE_GRAD_LOSSES

FLOAT = 4  # bytes: parameters, gradients and moments are float32
COMPRESSION, N_CODES, SIGNATURE_BYTES = 16, 8, 16
SECTOR = 32  # bytes that a GPU reads for any one number
TABLES = ("dense", "sparse_grad", "compositional", "lma")
# Processes that hold the classes together, None for all.
GROUPS = {"vocab_parallel": None, "vocab_parallel_8": 8, "vocab_parallel_64": 64}
SHARDINGS = ("ddp", "fsdp", *GROUPS)
NODE = 8  # GPUs that NVLink connects
JOINED = 2**28  # bytes: _JOINED_BYTES of hf_rece.ops.topk
ASSUMPTIONS = (
    "float32 tables under Adam (8 bytes of moments a number), tied: they look up the input too, "
    "and a dense one gets a gradient from either side; products in TF32 on GPUs",
    "GPUs: 40 % of the data sheet's TF32 rate, 80 % of its bandwidth for streams, 40 % for rows at "
    "random places, 80 % of a link; nothing overlaps, so steps may be faster than said",
    "NVLink inside 8 GPUs; beyond, each GPU's own network link bounds every collective",
    "of the backbone only its states count: at these widths it is small beside the table",
    "90 % of a device's memory may be used",
    "ddp: ring all-reduce of all gradients, buckets as large as they (with sparse_grad: the rows "
    "that each process touched go to all)",
    "fsdp: the table is one unit, gathered whole in forward and in backward",
    "vocab_parallel: classes are cut over all processes, whose tokens all meet all classes; every "
    "process keeps all their states and plans for all, with stratified for all classes too, as in "
    "hf_rece.ops.vocab_parallel; dense tables only",
    "vocab_parallel_8, _64: groups of as many neighbours hold all classes each, and average the "
    "gradients of their rows over the groups once a step, as with vocab_parallel_size; within 8, "
    "states travel by NVLink",
    "compositional: 8 digits an item from a log, side by side; lma: 8 keys an item; both 16 times "
    "fewer numbers, replicated",
)


@dataclass(frozen=True)
class Device:
    """A device by its data sheet, or as fitted.

    Args:
        memory: bytes.
        products: floating point operations a second of matrix products.
        streams: bytes a second, read or written in order.
        gathers: bytes a second of rows at random places.
        lookups: pieces of a compressed row a second, each at an address of its own.
        node_link: bytes a second that a device sends to others of its node of 8.
        network: bytes a second to other nodes.
        launch: seconds that a step takes however small it is.
    """

    memory: float
    products: float
    streams: float
    gathers: float
    lookups: float
    node_link: float = 0.0
    network: float = 0.0
    launch: float = 0.0


def from_data_sheet(
    memory: float, tf32: float, bandwidth: float, nvlink: float, network: float
) -> Device:
    """Return a GPU, of which ASSUMPTIONS' shares are reached.

    Args:
        memory: GB.
        tf32: TFLOP/s, without sparsity.
        bandwidth: GB/s.
        nvlink: GB/s in one direction.
        network: Gbit/s.
    """
    return Device(
        memory * 1e9,
        0.4 * tf32 * 1e12,
        0.8 * bandwidth * 1e9,
        0.4 * bandwidth * 1e9,
        0.4 * bandwidth * 1e9 / SECTOR,
        0.8 * nvlink * 1e9,
        0.8 * network * 1e9 / 8,
        2e-3,
    )


GPUS = {
    "A100-80": from_data_sheet(80, 156, 2039, 300, 200),
    "H100-80": from_data_sheet(80, 494.7, 3350, 450, 400),
    "H200-141": from_data_sheet(141, 494.7, 4800, 450, 400),
}


@dataclass(frozen=True)
class Case:
    """A training step.

    Args:
        items: C.
        width: D.
        tokens: labelled tokens of each process.
        ranks: processes, with a device each.
        loss: name in LOSSES, or "dense" for torch's.
        table: of TABLES.
        sharding: of SHARDINGS; of one process all are alike.
        device: "cuda" or "cpu", for the loss's tiles.
        updates: whether an optimiser's step and an input lookup belong to it.
    """

    items: int
    width: int
    tokens: int
    ranks: int = 1
    loss: str = "cross_entropy"
    table: str = "dense"
    sharding: str = "ddp"
    device: str = "cuda"
    updates: bool = True

    @property
    def is_possible(self) -> bool:
        """Whether hf_rece can run it at all."""
        if self.table == "sparse_grad":
            return self.loss in SPARSE_GRAD_LOSSES and self.sharding == "ddp"
        return self.table == "dense" or (self.sharding not in GROUPS and self.loss != "dense")

    @property
    def group(self) -> int:
        """Processes that hold the classes together: 1 where each has all of them."""
        if self.sharding not in GROUPS:
            return 1
        return min(GROUPS[self.sharding] or self.ranks, self.ranks)

    @property
    def is_cut(self) -> bool:
        """Whether its classes are cut over processes."""
        return self.group > 1

    @property
    def scored(self) -> int:
        """Tokens that a process scores."""
        return self.tokens * self.group

    @property
    def parameters(self) -> int:
        """Numbers of the whole table."""
        dense = self.items * self.width
        return dense if self.table in ("dense", "sparse_grad") else dense // COMPRESSION

    @property
    def lookups(self) -> int:
        """Addresses that a compressed row is put together from."""
        return {"lma": self.width, "compositional": N_CODES}.get(self.table, 0)

    @property
    def item_bytes(self) -> int:
        """Bytes that a compressed table keeps of an item: its digits, or its signature."""
        if self.table == "lma":
            return SIGNATURE_BYTES
        if self.table != "compositional":
            return 0
        sizes = (self.items, self.width, "concat", None, COMPRESSION, N_CODES)
        return N_CODES * narrowest(resolve_radices(*sizes)).itemsize


@dataclass(frozen=True)
class Cost:
    """What a step costs one process.

    Args:
        memory: bytes by name, all there at the peak.
        work: operations, bytes that are streamed or gathered, and lookups, by name.
        sent: bytes that go through its link.
        messages: collectives, one after another.
        near: of the bytes sent, those that stay in a node, where there are more nodes.
    """

    memory: dict[str, float]
    work: dict[str, float]
    sent: float
    messages: int
    near: float = 0.0

    @property
    def bytes(self) -> float:
        """Peak bytes."""
        return sum(self.memory.values())


def cost_of(case: Case) -> Cost:
    """Return what a process must keep, do and send in a step."""
    choice, estimate = _estimate(case)
    share = 1 / case.group
    own = case.parameters * share
    touched = _rows(case, choice) * share
    local = own / case.ranks if case.sharding == "fsdp" else own
    # Rows are read in forward and in backward, where their gradient is read and written.
    row = case.width * FLOAT
    passes = {"cross_entropy": 4, "dense": 5, "rece": 2, "sce": 1, "stratified": 1}
    streamed = passes.get(case.loss, 0) * case.items * share
    gathered = 4 * (touched + 2 * case.scored)
    streams = streamed * row
    if case.loss == "dense":
        streams += 6 * case.tokens * case.items * FLOAT
    if case.table == "sparse_grad":
        gathered += 8 * min(touched, case.items)
    elif case.updates:
        # Two gradients are zeroed and added up; Adam reads four numbers and writes three.
        streams += 5 * FLOAT * own + 7 * FLOAT * local
    else:
        streams += 4 * FLOAT * local  # zero; read and add to the gradient that there is
    work = {
        "products": estimate.flops * share + (1 - share) * _hashing(case, choice),
        "streams": streams,
        "gathers": gathered * row,
        "lookups": (streamed + gathered) * case.lookups,
    }
    best = _best_bytes(case, choice)
    sent, messages = _messages(case, choice, touched, best)
    if case.loss == "sce" and case.is_cut:
        # Groups are compared by two values for each of their tokens.
        sent += 4 * FLOAT * choice.n_buckets * choice.bucket_size_x
    near = sent if case.is_cut and case.group <= NODE < case.ranks else 0.0
    n_groups = case.ranks // case.group
    if case.is_cut and n_groups > 1:  # the gradient of the own rows, averaged over groups
        sent, messages = sent + 2 * (n_groups - 1) / n_groups * own * FLOAT, messages + 1
    return Cost(_memory(case, estimate, own, local, best), work, sent, messages, near)


def _estimate(case: Case) -> tuple[Any, Estimate]:
    """Return the loss's knobs, and what it costs with all that is not shared out."""
    weights = case.parameters // case.group
    shape = Shape(
        case.scored,
        case.items,
        case.width,
        device=torch.device(case.device),
        n_weights=weights,
        sparse_grad=case.table == "sparse_grad",
    )
    if case.loss == "dense":
        return None, dense_estimate(shape)
    entry: Any = LOSSES[case.loss]  # type: ignore[index]
    choice = entry.choose(entry.config(), shape)
    if case.loss == "rece" and case.is_cut:
        # The plan is of the own classes, and so are its bytes; operations are shared out later.
        own = entry.choose(choice.config, replace(shape, n_classes=-(-case.items // case.group)))
        return choice.config, replace(own.estimate, flops=choice.estimate.flops)
    return choice.config, choice.estimate


def _rows(case: Case, knobs: Any) -> float:
    """Return how many rows a loss gathers, in forward or in backward."""
    if case.loss == "rece":
        return knobs.n_rounds * case.items
    if case.loss == "sce":
        return knobs.n_buckets * min(knobs.bucket_size_y, case.items)
    if case.loss == "stratified":
        n_blocks = -(-case.items // knobs.n_random)
        met = min(1.0, case.scored / n_blocks) * case.items
        return knobs.n_groups * knobs.n_hard + met
    return getattr(knobs, "n_negatives", 0)


def _best_bytes(case: Case, knobs: Any) -> float:
    """Return the bytes of all processes' best classes, from which each picks the best of all."""
    if not case.is_cut or case.loss not in ("sce", "stratified"):
        return 0.0
    is_sce = case.loss == "sce"
    n_best = knobs.n_buckets * knobs.bucket_size_y if is_sce else knobs.n_groups * knobs.n_hard
    return case.group * n_best * 12.0  # a score, and an int64


def _hashing(case: Case, knobs: Any) -> float:
    """Return the operations of comparing tokens with directions, which every process does."""
    n_directions = 0
    if case.loss == "rece":
        n_directions = knobs.n_rounds * knobs.n_buckets
    if case.loss == "sce":
        n_directions = 2 * knobs.n_buckets
    if case.loss == "stratified":
        n_directions = knobs.n_groups
    return 2.0 * case.width * n_directions * case.scored


def _memory(
    case: Case, estimate: Estimate, own: float, local: float, best: float
) -> dict[str, float]:
    terms = estimate.terms
    # Gathered from all of the group, they stay until backward has sent their gradients back.
    states = FLOAT * case.width * case.scored if case.is_cut else 0.0
    moments = (
        terms["gradients"] + terms["skips"] + terms["tile"],
        terms["search"] + 2 * min(best, JOINED),
        states,  # joined from pieces
        terms["gradients"] + states,  # each process's part of the own tokens' gradients
    )
    is_tied = case.updates and case.table != "sparse_grad"
    memory = {
        "table": FLOAT * local,
        "moments": 2 * FLOAT * local * case.updates,
        "gradient as input": FLOAT * own * is_tied,
        "codes": case.item_bytes * case.items,
        "loss": terms["plan"] + terms["tokens"] + terms["libraries"],
        "states of all": states,
        "gradients or search": max(moments),
    }
    if case.ranks > 1 and case.sharding == "fsdp":
        memory["gathered"] = FLOAT * own + FLOAT * local  # the whole table; its own gradients
    if case.ranks > 1 and case.sharding == "ddp" and case.table != "sparse_grad":
        memory["buckets"] = FLOAT * own
    return {name: value for name, value in memory.items() if value}


def _messages(case: Case, knobs: Any, touched: float, best: float) -> tuple[float, int]:
    """Return the bytes that a process sends in a step, and in how many collectives."""
    ranks, row = case.ranks, case.width * FLOAT
    if ranks == 1:
        return 0.0, 0
    ring = (ranks - 1) / ranks
    if case.sharding == "fsdp":
        return 3 * ring * case.parameters * FLOAT, 3
    if case.sharding == "ddp" and case.table == "sparse_grad":
        return (ranks - 1) * (touched + 2 * case.tokens) * (row + 8), 2
    if case.sharding == "ddp":
        return 2 * ring * case.parameters * FLOAT, 1
    ring = (case.group - 1) / case.group
    # States and labels to all, the states' gradients back; ids and rows of inputs, and gradients.
    sent = ring * case.scored * (2 * row + 8) + 2 * ring * case.tokens * (row + 8)
    sent += 2 * 5 * ring * case.scored * FLOAT  # three values a token forward, two backward
    if case.loss == "rece":
        sent += knobs.n_rounds * (case.group - 1) * knobs.n_buckets * 8  # sizes of the buckets
    return sent + ring * best, 12


def seconds(cost: Cost, device: Device, ranks: int = 1) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on."""
    link = device.node_link if ranks <= NODE else device.network
    hops = 10e-6 * max(1, ranks - 1).bit_length()
    messages = cost.messages * hops
    if cost.sent:
        messages += (cost.sent - cost.near) / link
    if cost.near:
        messages += cost.near / device.node_link
    return {
        **{name: amount / getattr(device, name) for name, amount in cost.work.items()},
        "messages": messages,
        "launch": device.launch,
    }
