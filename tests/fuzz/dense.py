"""A loss from the pairs of its plan, all at once, in float64: no tiles, no streaming."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class Pairs:
    """The P (token, class) pairs that a plan scores, four (P,) tensors.

    A group of a grid is numbered over all grids of the plan.
    """

    token: torch.Tensor
    scored: torch.Tensor
    group: torch.Tensor
    log_weight: torch.Tensor


def pairs_of(plan):
    """All pairs of a plan, read off its grids, one whole grid at a time."""
    found, first_group = [], 0
    for grid in plan.grids if plan.n_tokens else ():
        tokens = grid.tokens.long()
        if grid.classes is None:
            classes = torch.arange(plan.n_classes).unsqueeze(0)
        else:
            classes = grid.classes.long()
        shape = (*tokens.shape, classes.shape[1])
        token, scored = tokens[:, :, None].expand(shape), classes[:, None, :].expand(shape)
        group = torch.arange(shape[0])[:, None, None].expand(shape) + first_group
        log_weight = torch.zeros(shape, dtype=torch.float64)
        if grid.token_log_weight is not None:
            log_weight = log_weight + grid.token_log_weight.double()[:, :, None]
        if grid.class_log_weight is not None:
            log_weight = log_weight + grid.class_log_weight.double()[:, None, :]
        kept = _kept(plan, grid, token, scored)
        found.append([part[kept] for part in (token, scored, group, log_weight)])
        first_group += shape[0]
    if not found:
        nothing = torch.empty(0, dtype=torch.long)
        return Pairs(nothing, nothing, nothing, nothing.double())
    return Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _kept(plan, grid, token, scored):
    kept = (token != plan.n_tokens) & (scored != plan.n_classes)
    if grid.skip is not None:
        kept[grid.skip.unbind(1)] = False
    if grid.blocked is not None:
        kept &= ~torch.isin(scored, grid.blocked)
    if grid.own_labels is not None:
        kept &= grid.own_labels.long()[token] != scored
    for earlier in grid.earlier:
        apart = earlier.token_chunks.long()[token] - earlier.class_chunks.long()[scored]
        kept &= apart.abs() > earlier.reach
    return kept


def log_sum_exp_by(values, keys, n_keys):
    """(n_keys,) log-sum-exp of the values (P,) with each key; -inf for a key without values."""
    top = torch.full((n_keys,), torch.finfo(values.dtype).min, dtype=values.dtype)
    top = top.scatter_reduce(0, keys, values.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, keys, (values - top[keys]).exp())
    # log(0) has no gradient to speak of.
    return torch.where(total > 0, total.clamp(min=1e-300).log() + top, -torch.inf)


def softmax_losses(plan, pairs, logits, labels):
    """Per-token losses (N,) of a softmax over label and pairs."""
    own = logits.gather(1, labels[:, None])[:, 0]
    values = logits[pairs.token, pairs.scored] + pairs.log_weight
    return torch.logaddexp(own, log_sum_exp_by(values, pairs.token, plan.n_tokens)) - own


def largest_losses(plan, pairs, logits, labels):
    """Per-token losses (N,) of the group where each is largest, and its lead over all others.

    A token in no group, or in groups without another class, has loss 0.
    """
    own = logits.gather(1, labels[:, None])
    n_groups = sum(len(grid.tokens) for grid in plan.grids)
    values = logits[pairs.token, pairs.scored] + pairs.log_weight
    by_group = log_sum_exp_by(values, pairs.token * n_groups + pairs.group, len(labels) * n_groups)
    losses = torch.logaddexp(own, by_group.view(-1, n_groups)) - own
    best = losses.max(1).values if n_groups else own[:, 0] * 0
    classes = torch.zeros(len(labels), n_groups, plan.n_classes, dtype=torch.bool)
    classes[pairs.token, pairs.group, pairs.scored] = True
    winner = losses.argmax(1)
    same = (classes == classes[torch.arange(len(labels)), winner][:, None]).all(2)
    others = losses.detach().masked_fill(same, -torch.inf).max(1).values
    return best, (best.detach() - others)


def binary_losses(plan, pairs, logits, labels, n_negatives, beta):
    """Per-token losses (N,) under a binary link."""
    own = logits.gather(1, labels[:, None])[:, 0]
    values = logits[pairs.token, pairs.scored]
    others = torch.zeros_like(own).index_add(0, pairs.token, F.softplus(values, threshold=500))
    return (beta * F.softplus(-own, threshold=500) + others) / (n_negatives + 1)
