"""Torch in place of kernels that turn out not to compile where they run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

Kernel = TypeVar("Kernel")
Result = TypeVar("Result")

# What was raised first, for the rest of the process.
_refusals: list[str] = []
# RuntimeErrors of Triton: of its search for a C compiler, and of its compiler's passes.
_SIGNS = ("Failed to find C compiler", "PassManager::run failed")


def is_refused() -> bool:
    """Return whether Triton has refused to compile a kernel in this process."""
    return bool(_refusals)


def or_by(other: Kernel, kernel: Kernel, work: Callable[[Kernel], Result]) -> Result:
    """Return work(kernel), or work(other) where Triton refuses to compile; the first time, warn.

    Args:
        other: what serves anywhere.
        kernel: what is tried first.
        work: makes all that it adds into, so that what it did before it failed is gone.
    """
    try:
        return work(kernel)
    except _suspects() as error:
        if not is_refusal(error):
            raise
        if not _refusals:
            warnings.warn(
                f"Triton refused a kernel, so torch serves in its place: {error!r:.500}. Pass "
                'backend="torch" to begin with it, or backend="triton" to see the whole error',
                stacklevel=2,
            )
        _refusals.append(repr(error))
    return work(other)


def is_refusal(error: BaseException) -> bool:
    """Return whether Triton could not compile a kernel, or not fit it into the device."""
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in _SIGNS)
    return isinstance(error, _suspects())


def _suspects() -> tuple[type[Exception], ...]:
    # Whoever did not choose Triton does not wait for its import.
    if "triton" not in sys.modules:
        return (RuntimeError,)
    # The last, of the C compiler that Triton calls.
    failed_call = import_module("triton.runtime.build").subprocess.CalledProcessError
    return RuntimeError, import_module("triton.errors").TritonError, failed_call
