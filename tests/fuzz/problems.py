"""Problems for a loss: any shape, dtype, layout, mask and option that it says it takes."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from hf_rece.losses.options import SPARSE_GRAD_LOSSES

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Problem:
    """What a loss is called with.

    hidden is (N, D) or (B, T, D), labels of its leading shape; options are CommonOptions that are
    no tensors, and knobs the loss's own.
    """

    name: str
    knobs: dict
    options: dict
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    seed: int

    def __repr__(self):
        described = {
            key: (tuple(t.shape), tuple(t.stride()), t.dtype, t.requires_grad)
            for key, t in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias))
            if t is not None
        }
        return (
            f"Problem({self.name}, knobs={self.knobs}, options={self.options}, {described}, "
            f"labels={self.labels.tolist()} {self.labels.dtype}, seed={self.seed})"
        )

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def tensors(self):
        """Those that want a gradient."""
        of_loss = (self.hidden, self.weight, self.bias)
        return [t for t in of_loss if t is not None and t.requires_grad]


def laid_out(values, layout):
    """The same values, in memory another way."""
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([values, torch.full_like(values, 7)], dim=-1)[..., 0]
    if layout == "offset":
        padded = torch.cat([values.new_zeros(1, *values.shape[1:]), values])
        return padded.narrow(0, 1, len(values))
    return values.contiguous()


layouts = st.sampled_from(["contiguous", "transposed", "strided", "offset"])

# Ordinary, tiny, so large that a softmax is one-hot, and so large that exp overflows at once.
magnitudes = st.sampled_from([1.0, 1.0, 0.1, 1e-4, 0.0, 8.0, 60.0, 3000.0])


@st.composite
def common_options(draw, name, n_tokens):
    """Shared options other than tensors, excluded ids and ignore_index."""
    options = {"tile_bytes": draw(st.sampled_from([None, 1, 700, 20_000, 2**26]))}
    if draw(st.booleans()):
        options["backend"] = "torch"
    if draw(st.booleans()):
        options["logit_scale"] = draw(st.sampled_from([1.0, 0.25, 3.0, -1.0, 0.0, 1e-3]))
    if draw(st.booleans()):
        options["logit_softcap"] = draw(st.sampled_from([30.0, 1.0, 0.01, 1e4]))
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if draw(st.booleans()):
        count = draw(st.integers(0, 3 * n_tokens))
        options["num_items_in_batch"] = torch.tensor(count) if draw(st.booleans()) else count
    if name in SPARSE_GRAD_LOSSES:
        options["sparse_grad"] = draw(st.booleans())
    return options


@st.composite
def knobs_of(draw, name, n_tokens, n_classes, has_sequences):
    """Knobs of a loss, beyond what there is at times."""
    some = st.integers(1, 2 * max(n_tokens, 4))
    classes = st.integers(1, n_classes + 5)

    def maybe(strategy):
        return draw(st.none() | strategy)

    if name == "cross_entropy":
        return {}
    if name == "rece":
        return {
            "n_buckets": maybe(some),
            "buckets_per_chunk": draw(st.integers(1, 4)),
            "n_extra_chunks": maybe(st.integers(0, 6) | st.just(10**6)),
            "n_rounds": draw(st.integers(1, 4)),
        }
    if name == "sce":
        return {
            "n_buckets": maybe(some),
            "bucket_size_x": maybe(some),
            "bucket_size_y": maybe(classes),
            "mix": draw(st.booleans()),
        }
    if name == "stratified":
        return {"n_groups": maybe(some), "n_hard": maybe(classes), "n_random": maybe(classes)}
    knobs = {"n_negatives": draw(st.integers(1, 40) | st.just(300))}
    samplers = ["uniform", "log_uniform"]
    if name == "sampled_softmax":
        samplers.append("in_batch")
        knobs["logq"] = draw(st.booleans())
    if name == "gbce":
        knobs["t"] = draw(st.sampled_from([0.0, 0.25, 0.75, 1.0]))
    knobs["sampler"] = draw(st.sampled_from(samplers))
    if has_sequences and knobs["sampler"] != "in_batch":
        knobs["shared_by"] = draw(st.sampled_from(["batch", "sequence"]))
    return knobs


@st.composite
def label_lists(draw, shape, n_classes, excluded, dtype):
    """Labels of a shape and the ignore_index that some, or all, of them carry."""
    n_tokens = torch.Size(shape).numel()
    taken = set(excluded)
    free = [c for c in range(n_classes) if c not in taken]
    small = torch.iinfo(dtype)
    ignore_index = draw(
        st.sampled_from([i for i in (-100, -1, n_classes + 7, 0) if small.min <= i <= small.max])
    )
    if not free or draw(st.sampled_from([False] * 9 + [True])):
        return torch.full(shape, ignore_index, dtype=dtype), ignore_index
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    few = draw(st.sampled_from([1, 3, len(free)]))  # one label for all, up to any
    choices = torch.tensor(free)[torch.randperm(len(free), generator=make)[:few]]
    labels = choices[torch.randint(len(choices), (n_tokens,), generator=make)]
    share = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    labels[torch.rand(n_tokens, generator=make) < share] = ignore_index
    return labels.to(dtype).view(shape), ignore_index


@st.composite
def problems(draw, name, dtypes=DTYPES):
    """A Problem for the loss `name`."""
    has_sequences = draw(st.booleans())
    if has_sequences:
        shape = (draw(st.integers(0, 5)), draw(st.integers(0, 8)))
    else:
        shape = (draw(st.integers(0, 40)),)
    n_classes = draw(st.integers(2, 12) | st.integers(2, 200))
    width = draw(st.integers(1, 8) | st.integers(1, 48))
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**20))
    make = torch.Generator().manual_seed(seed)
    excluded = []
    if draw(st.booleans()):
        some = st.integers(0, n_classes - 1)
        excluded = draw(st.lists(some, max_size=6) | st.just(list(range(1, n_classes))))
        excluded = excluded if len(set(excluded)) < n_classes else excluded[:1]
    label_dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))
    labels, ignore_index = draw(label_lists(shape, n_classes, excluded, label_dtype))
    options = draw(common_options(name, labels.numel()))
    options["ignore_index"] = ignore_index
    if excluded:
        as_tensor = draw(st.booleans())
        options["excluded_ids"] = torch.tensor(excluded) if as_tensor else excluded

    def tensor(*size):
        values = torch.randn(size, generator=make) * draw(magnitudes) / max(1, size[-1]) ** 0.5
        mixed = draw(st.sampled_from([False, False, False, True]))
        return values.to(draw(st.sampled_from(dtypes)) if mixed else dtype)

    hidden = laid_out(tensor(*shape, width), draw(layouts))
    weight = laid_out(tensor(n_classes, width), draw(layouts))
    bias = laid_out(tensor(n_classes), draw(layouts)) if draw(st.booleans()) else None
    frozen = draw(st.sampled_from(["", "", "", "hidden", "weight", "bias", "hidden weight"]))
    for called, t in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if t is not None and called not in frozen:
            t.requires_grad_()
    knobs = draw(knobs_of(name, labels.numel(), n_classes, has_sequences))
    return Problem(name, knobs, options, hidden, weight, bias, labels, seed)
