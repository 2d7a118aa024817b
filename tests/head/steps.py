"""One training step, and the comparison of two."""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_rece import replace_output_head


def step(model, batch, **arguments):
    """Return the loss and the gradients by name (None kept) of one forward and backward pass."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**batch, **arguments).loss
    loss.backward()
    gradients = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return loss.detach(), gradients


def assert_same_step(got, wanted, tolerance=1e-4):
    """Both steps have equal losses, and gradients in the same parameters, which are equal too."""
    torch.testing.assert_close(got[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert set(got[1]) == set(wanted[1])
    assert any(gradient is not None for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert (got[1][name] is None) == (gradient is None), name
        if gradient is not None:
            largest = gradient.abs().max().item()
            torch.testing.assert_close(
                got[1][name],
                gradient,
                rtol=tolerance,
                atol=tolerance * max(largest, 1e-2),
                msg=lambda text, name=name: f"{name}: {text}",
            )


def assert_trains_like_dense(model, batch, tolerance=1e-4, **arguments):
    """A replaced copy of `model` has the loss and the gradients of `model` itself."""
    replaced = replace_output_head(copy.deepcopy(model), "cross_entropy")
    assert_same_step(step(replaced, batch, **arguments), step(model, batch, **arguments), tolerance)


class LargestTensors(TorchDispatchMode):
    """Note the tensors that any operation returns and that are as large as (tokens, vocabulary).

    Args:
        n_tokens: labelled or not.
        n_classes: size of the vocabulary.
        also: another shape to note, such as that of the output layer's weight.
    """

    def __init__(self, n_tokens, n_classes, also=None):
        super().__init__()
        self.n_tokens, self.n_classes, self.also = n_tokens, n_classes, also
        self.logits, self.others = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            large = tensor.numel() >= self.n_tokens * self.n_classes
            if large and self.n_classes in tensor.shape:
                self.logits.append((str(func), tuple(tensor.shape)))
            if tensor.shape == self.also:
                self.others.append(str(func))
        return result
