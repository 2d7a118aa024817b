"""Losses that travel through a model in the place of its logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from hf_rece.errors import ArgumentError
from hf_rece.head.shaping import Operation, not_understood

_SCALARS = {
    "mul": "mul", "mul_": "mul", "multiply": "mul", "__mul__": "mul", "__rmul__": "mul",
    "__imul__": "mul", "div": "div", "div_": "div", "divide": "div", "true_divide": "div",
    "__truediv__": "div", "__itruediv__": "div", "add": "add", "add_": "add", "__add__": "add",
    "__radd__": "add", "__iadd__": "add", "sub": "sub", "sub_": "sub", "__sub__": "sub",
    "__isub__": "sub", "neg": "neg", "neg_": "neg", "__neg__": "neg", "tanh": "tanh",
    "tanh_": "tanh",
}  # fmt: skip
_IN_PLACE = {name for name in _SCALARS if name.endswith("_") and not name.endswith("__")} | {
    "__imul__", "__itruediv__", "__iadd__", "__isub__",
}  # fmt: skip
_SAME_VALUES = {
    "to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "requires_grad_", "cpu",
    "cuda",
}  # fmt: skip
# Sharding and hooks copy what a module returns.
_COPIES = {"detach", "view_as", "alias", "clone"}
_SHAPES = {"view", "reshape", "flatten"}
_QUESTIONS = {
    "__get__", "__len__", "__hash__", "__repr__", "__format__", "dim", "ndimension", "get_device",
    "register_hook",
}  # fmt: skip


class LossCarrier(Tensor):
    """Losses (..., 1) that stand for logits (..., C) until the model computes its cross-entropy.

    A model may scale its logits, cap them, change their shape and drop positions; the carrier notes
    the arithmetic, follows the shapes, and answers cross_entropy with its losses, provided that the
    labels are those that the losses were made with. Asked for its shape, it answers as logits do.
    Anything else is an error.

    Attributes:
        labels: (..., 1) int64, the label of each loss, -100 for none.
        operations: the arithmetic so far.
        n_classes: C.
        model: class of the model, for messages.
        reached: called with the operations when the model asks for the cross-entropy.
    """

    labels: Tensor
    operations: tuple[Operation, ...]
    n_classes: int
    model: str
    reached: Callable[[tuple[Operation, ...]], None]

    @staticmethod
    def wrap(
        losses: Tensor,
        labels: Tensor,
        n_classes: int,
        model: str,
        reached: Callable[[tuple[Operation, ...]], None],
    ) -> LossCarrier:
        """Return losses (..., 1) and their labels (..., 1) as a carrier."""
        with torch._C.DisableTorchFunctionSubclass():
            carrier = losses.as_subclass(LossCarrier)
        carrier.labels, carrier.operations = labels, ()
        carrier.n_classes, carrier.model, carrier.reached = n_classes, model, reached
        return carrier

    def plain(self) -> Tensor:
        """Return the losses as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def _with(self, losses: Tensor, labels: Tensor, *operations: Operation) -> LossCarrier:
        carrier = LossCarrier.wrap(losses, labels, self.n_classes, self.model, self.reached)
        carrier.operations = (*self.operations, *operations)
        return carrier

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Follow one operation of the model."""
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            return _cross_entropy(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        carrier = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if name in _SCALARS:
            return _arithmetic(carrier, name, args, kwargs)
        if not args or args[0] is not carrier:
            raise not_understood(carrier.model, name)
        if name == "__getitem__":
            return _select(carrier, args[1])
        if name in _SHAPES:
            return _reshape(carrier, func, args[1:], kwargs)
        size = _size_of_logits(carrier, func, args[1:], kwargs)
        return _copy_or_answer(carrier, func, args, kwargs) if size is None else size


def _copy_or_answer(
    carrier: LossCarrier, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return a carrier where `func` copies, its answer where it asks a question."""
    name = getattr(func, "__name__", str(func))
    if name not in _SAME_VALUES | _COPIES | _QUESTIONS and not name.startswith("is_"):
        raise not_understood(carrier.model, name)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if not isinstance(result, Tensor):
        return result
    if getattr(func, "__self__", None) is Tensor._base:
        return None  # of the losses: logits are a view of nothing
    if name in _SAME_VALUES:  # as many digits as before, where the model wants them
        result = carrier.plain().to(result.device)
    elif name not in _COPIES:
        raise not_understood(carrier.model, getattr(func, "__self__", func).__name__)
    return carrier._with(result, carrier.labels)


def _arithmetic(
    carrier: LossCarrier, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LossCarrier:
    operation = _SCALARS[name]
    numbers = [value for value in args if value is not carrier]
    (number,) = numbers if len(numbers) == 1 else (1.0,)
    learned = isinstance(number, Tensor) and (number.numel() != 1 or number.requires_grad)
    unary = operation in ("neg", "tanh")
    known = len(args) == (1 if unary else 2) and len(numbers) == len(args) - 1
    if learned or kwargs or not known:
        raise not_understood(carrier.model, f"{operation} with a tensor or an option")
    if operation in ("div", "sub") and args[0] is not carrier:
        raise not_understood(carrier.model, f"{operation} of a number by logits")
    noted = Operation(operation, float(number))
    if name in _IN_PLACE:
        carrier.operations = (*carrier.operations, noted)
        return carrier
    return carrier._with(carrier.plain(), carrier.labels, noted)


def _size_of_logits(
    carrier: LossCarrier, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Size | int | None:
    """Answer a question about the shape of the logits; None for any other question."""
    name = getattr(func, "__name__", "")
    asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
    if asked not in ("shape", "size", "numel", "nelement"):
        return None
    shape = torch.Size((*carrier.plain().shape[:-1], carrier.n_classes))
    if asked in ("numel", "nelement"):
        return shape.numel()
    place = args[0] if args else kwargs.get("dim")
    return shape if asked == "shape" or place is None else shape[place]


def _reshape(
    carrier: LossCarrier, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LossCarrier:
    shape = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if func.__name__ != "flatten":
        keeps_classes = len(shape) > 1 and shape[-1] in (-1, carrier.n_classes)
        n_positions = carrier.plain().numel()
        fits = keeps_classes and (-1 in shape[:-1] or math.prod(shape[:-1]) == n_positions)
        if kwargs or not fits:
            raise not_understood(carrier.model, f"{func.__name__}{tuple(shape)}")
        shape = (*shape[:-1], 1)
        return carrier._with(carrier.plain().reshape(shape), carrier.labels.reshape(shape))
    losses = carrier.plain().flatten(*args, **kwargs)
    if losses.dim() == 1 or losses.shape[-1] != 1:
        raise not_understood(carrier.model, "flatten")
    return carrier._with(losses, carrier.labels.flatten(*args, **kwargs))


def _select(carrier: LossCarrier, key: Any) -> LossCarrier:
    keys = key if isinstance(key, tuple) else (key,)
    has_ellipsis = any(part is Ellipsis for part in keys)
    n_dims = sum(_n_dims_of_key(part) for part in keys)
    reaches_classes = has_ellipsis or n_dims == carrier.plain().dim()
    last = keys[-1]
    if reaches_classes and last is not Ellipsis and not _is_whole(last, carrier.n_classes):
        raise not_understood(carrier.model, f"[{key}]")
    return carrier._with(carrier.plain()[key], carrier.labels[key])


def _n_dims_of_key(key: Any) -> int:
    """Return how many dimensions a part of an index takes."""
    if key is None or key is Ellipsis:
        return 0
    return key.dim() if isinstance(key, Tensor) and key.dtype == torch.bool else 1


def _is_whole(key: Any, n_classes: int) -> bool:
    return isinstance(key, slice) and key.indices(n_classes) == (0, n_classes, 1)


def _cross_entropy(
    input: LossCarrier,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Answer torch.nn.functional.cross_entropy with the losses that are carried."""
    if weight is not None or label_smoothing or not isinstance(input, LossCarrier):
        raise not_understood(getattr(input, "model", "?"), "a weighted or smoothed cross_entropy")
    labels = input.labels.squeeze(-1).to(input.plain().device)
    used = target.masked_fill(target == ignore_index, -100)
    if labels.shape != used.shape or not torch.equal(labels, used.to(labels.device)):
        raise ArgumentError(
            "model",
            input.model,
            "it computes its loss from other labels than it was given",
            "Train it with its own loss: restore_output_head(model)",
        )
    input.reached(input.operations)
    losses = input.plain().squeeze(-1)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != -100).sum().clamp(min=1)
