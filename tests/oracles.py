"""Every loss again: dense, in float64, with no cleverness, and sharing no code with the library."""

import torch
from torch.nn import functional as F


def dense_logits(hidden, weight, bias=None, logit_scale=1.0, logit_softcap=None):
    """(N, C) logits."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def softmax_over(logits, labels, candidates):
    """Per-token loss over the label and the candidate mask (N, C), the label counted once."""
    losses = []
    for row, label, mask in zip(logits, labels, candidates, strict=True):
        others = row[[j for j in range(len(row)) if mask[j] and j != label]]
        losses.append(torch.cat([row[label].reshape(1), others]).logsumexp(0) - row[label])
    return torch.stack(losses)


def rece_candidates(hidden, weight, directions, n_chunks, n_extra_chunks, excluded=()):
    """(N, C) mask of the pairs that any round brings together."""
    n_tokens, n_classes = len(hidden), len(weight)
    mask = torch.zeros(n_tokens, n_classes, dtype=torch.bool)
    for of_round in directions:
        chunk = []
        for vectors in (hidden, weight):
            order = sorted(
                range(len(vectors)), key=lambda i, v=vectors: int((of_round @ v[i]).argmax())
            )
            size = -(-len(vectors) // n_chunks)
            chunk.append({i: place // size for place, i in enumerate(order)})
        for i in range(n_tokens):
            for j in range(n_classes):
                mask[i, j] |= abs(chunk[0][i] - chunk[1][j]) <= n_extra_chunks
    mask[:, list(excluded)] = False
    return mask


def sce_losses(logits, hidden, weight, labels, directions, size_x, size_y, excluded=()):
    """Per-token losses, 0 for tokens in no bucket."""
    best = {}
    for direction in directions:
        tokens = (hidden @ direction).topk(size_x).indices
        scores = weight @ direction
        scores[list(excluded)] = -torch.inf
        classes = scores.topk(size_y).indices.tolist()
        for i in tokens.tolist():
            y = int(labels[i])
            others = logits[i, [j for j in classes if j != y and j not in excluded]]
            loss = torch.cat([logits[i, y].reshape(1), others]).logsumexp(0) - logits[i, y]
            if i not in best or loss > best[i]:
                best[i] = loss
    return torch.stack([best.get(i, logits.new_zeros(())) for i in range(len(labels))])


def sampled_softmax_losses(logits, labels, negatives, weights=None):
    """Per-token losses against (N, K) drawn classes; draws of the label are dropped."""
    losses = []
    for i, label in enumerate(labels):
        total = logits[i, label].exp()
        for k, j in enumerate(negatives[i]):
            if j != label:
                total = total + logits[i, j].exp() * (1 if weights is None else weights[i, k])
        losses.append(total.log() - logits[i, label])
    return torch.stack(losses)


def binary_losses(logits, labels, negatives, beta=1.0):
    """Per-token binary losses against (N, K) drawn classes; draws of the label are dropped."""
    losses = []
    for i, label in enumerate(labels):
        loss = -beta * F.logsigmoid(logits[i, label])
        for j in negatives[i]:
            if j != label:
                loss = loss - F.logsigmoid(-logits[i, j])
        losses.append(loss / (len(negatives[i]) + 1))
    return torch.stack(losses)


def assert_same_gradients(loss, wanted, *tensors):
    """The sums of both losses have equal gradients in every tensor."""
    for got, want in zip(
        torch.autograd.grad(loss.sum(), tensors),
        torch.autograd.grad(wanted.sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
