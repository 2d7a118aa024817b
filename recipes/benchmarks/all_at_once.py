"""RECE and SCE with all logits of all buckets at once: oracles, for memory beside losses.py's own.

    python recipes/benchmarks/losses.py --contenders oracle_rece oracle_sce rece sce

The papers' programs carry no licence to ship. These are plain re-implementations, from the papers
(arXiv 2408.02354, 2409.18721), of the same tensors alive at the same time, and not the authors'
programs: every bucket's logits, class ids and gathered rows exist at once.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def n_buckets_of_rece(n_tokens: int, n_classes: int, n_extra_chunks: int = 1) -> int:
    """Return the papers' balance between hashing and scoring."""
    return math.isqrt(4 * (1 + 2 * n_extra_chunks) * min(n_tokens, n_classes))


def rece_all_at_once(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    n_extra_chunks: int = 1,
    n_rounds: int = 2,
    directions: Tensor | None = None,
) -> Tensor:
    """Return RECE's mean loss; a chunk for each bucket."""
    if directions is None:
        n_buckets = n_buckets_of_rece(len(hidden), len(weight), n_extra_chunks)
        directions = hidden.new_empty(n_rounds, n_buckets, hidden.shape[1]).normal_()
    n_chunks = directions.shape[1]
    with torch.no_grad():
        tokens = _chunks((directions @ hidden.T).argmax(1), n_chunks)  # (R, chunks, size), -1: none
        classes = _chunks((directions @ weight.T).argmax(1), n_chunks)
        edges = F.pad(classes, (0, 0, n_extra_chunks, n_extra_chunks), value=-1)
        windows = edges.unfold(1, 1 + 2 * n_extra_chunks, 1).flatten(2)  # (R, chunks, met)
        # Where each token lies in the sorted order, to bring its logits back.
        places = torch.empty(len(tokens), len(hidden) + 1, dtype=torch.int64, device=hidden.device)
        spots = torch.arange(tokens[0].numel(), device=hidden.device).expand(len(tokens), -1)
        places.scatter_(1, tokens.flatten(1) % (len(hidden) + 1), spots)
        rounds = torch.arange(len(tokens), device=hidden.device).unsqueeze(1)
    logits = hidden[tokens] @ weight[windows].transpose(2, 3)  # all buckets of all rounds
    ids = windows.unsqueeze(2).expand_as(logits)
    logits, ids = (
        of_pairs.flatten(1, 2)[rounds, places[:, :-1]].transpose(0, 1).flatten(1)
        for of_pairs in (logits, ids)
    )
    with torch.no_grad():
        order, ids = ids.sort(dim=1).values, ids.contiguous()
        found = torch.searchsorted(order, ids, right=True) - torch.searchsorted(order, ids)
        correction = found.to(logits.dtype).log()
        correction[(ids == labels.unsqueeze(1)) | (ids < 0)] = math.inf
    positive = (hidden * weight[labels]).sum(1, keepdim=True)
    scores = torch.cat([logits - correction, positive], dim=1)
    return F.cross_entropy(scores.float(), labels.new_full(labels.shape, scores.shape[1] - 1))


def _chunks(buckets: Tensor, n_chunks: int) -> Tensor:
    """Return (R, n_chunks, size): places sorted by bucket and cut, -1 where there is none."""
    order = buckets.argsort(dim=1, stable=True)
    size = -(-order.shape[1] // n_chunks)
    return F.pad(order, (0, n_chunks * size - order.shape[1]), value=-1).unflatten(1, (-1, size))


def sce_all_at_once(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bucket_size_y: int = 256,
    directions: Tensor | None = None,
) -> Tensor:
    """Return SCE's mean loss over the tokens in some bucket."""
    n_buckets = size_x = math.floor(2 * math.sqrt(len(hidden)))
    if directions is None:
        with torch.no_grad():
            directions = hidden.new_empty(n_buckets, len(hidden)).normal_() @ hidden  # mixed
    with torch.no_grad():
        tokens = (directions @ hidden.T).topk(min(size_x, len(hidden)), dim=1).indices
        classes = (directions @ weight.T).topk(min(bucket_size_y, len(weight)), dim=1).indices
    logits = hidden[tokens] @ weight[classes].transpose(1, 2)  # (buckets, tokens, classes)
    own = classes.unsqueeze(1) == labels[tokens].unsqueeze(2)
    positive = (hidden[tokens] * weight[labels[tokens]]).sum(2, keepdim=True)
    scores = torch.cat([logits.masked_fill(own, -math.inf), positive], dim=2)
    losses = scores.float().logsumexp(2) - positive.squeeze(2).float()
    largest = losses.new_zeros(len(hidden)).scatter_reduce(
        0, tokens.flatten(), losses.flatten(), "amax", include_self=False
    )
    return largest.sum() / (largest != 0).sum().clamp(min=1)
