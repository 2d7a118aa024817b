"""Weights that are whole only while their module is called: FSDP, ZeRO-3, offloading."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_rece.embeddings.table_head import TableHead

Result = TypeVar("Result")


def call_gathered(layer: nn.Module, compute: Callable[[Tensor], Result], hidden: Tensor) -> Result:
    """Return compute(hidden), computed while the weights of an output layer are whole.

    FSDP, DeepSpeed's ZeRO-3 and Accelerate's offloading bring a module's weights together before
    its own call and take them away after it, forward and backward. So `compute` takes the place of
    `forward` in a call of the layer, and of the table that its rows come from, where such hooks
    are.

    Args:
        layer: output layer, plain, wrapped by PEFT, or a TableHead.
        compute: reads the rows of `layer`; returns a tensor or a tuple of tensors.
        hidden: what autograd differentiates `compute` by.
    """
    call = compute
    modules = [layer, layer.table] if isinstance(layer, TableHead) else [layer]
    for module in reversed(modules):
        if _is_hooked(module):
            call = functools.partial(_call, module, call)
    return call(hidden)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` compute `forward` in the place of its own.

    Args:
        module: whose hooks, and Accelerate's, stay around the call.
        forward: takes what the module takes.
    """
    # Where Accelerate offloads, its own forward moves the weights and then calls this one.
    slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
    own = vars(module).get(slot)
    vars(module)[slot] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)[slot]
        else:
            vars(module)[slot] = own


def _call(module: nn.Module, forward: Callable[[Tensor], Result], hidden: Tensor) -> Result:
    with forward_replaced(module, forward):
        result: Result = module(hidden)
    return result


def _is_hooked(module: nn.Module) -> bool:
    """Return whether anything is done before a call of `module`.

    Others are left alone: a forward that changes for a call is no good where threads share a model.
    """
    return bool(module._forward_pre_hooks) or "_old_forward" in vars(module)
