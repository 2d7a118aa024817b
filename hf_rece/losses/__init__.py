"""The table of losses: name -> (config, function), and how a name and its knobs become a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor
from typing_extensions import Unpack

from hf_rece.errors import ArgumentError
from hf_rece.losses.budget import Choice
from hf_rece.losses.cross_entropy import (
    CrossEntropyConfig,
    choose_cross_entropy,
    cross_entropy_loss,
)
from hf_rece.losses.options import CommonOptions, Options, check_sparse_grad
from hf_rece.losses.rece import RECEConfig, choose_rece, rece_loss
from hf_rece.losses.sampled import (
    BCEConfig,
    GBCEConfig,
    SampledSoftmaxConfig,
    bce_loss,
    choose_sampled,
    gbce_loss,
    sampled_softmax_loss,
)
from hf_rece.losses.sce import SCEConfig, choose_sce, sce_loss
from hf_rece.losses.stratified import StratifiedConfig, choose_stratified, stratified_loss
from hf_rece.ops.rows import OutputRows

__all__ = [
    "LOSSES",
    "BCEConfig",
    "CrossEntropyConfig",
    "GBCEConfig",
    "Loss",
    "LossConfig",
    "LossEntry",
    "LossName",
    "RECEConfig",
    "SCEConfig",
    "SampledSoftmaxConfig",
    "StratifiedConfig",
    "bce_loss",
    "build_loss",
    "cross_entropy_loss",
    "gbce_loss",
    "rece_loss",
    "sampled_softmax_loss",
    "sce_loss",
    "stratified_loss",
]

LossName = Literal["cross_entropy", "rece", "sce", "stratified", "sampled_softmax", "bce", "gbce"]
LossConfig = (
    CrossEntropyConfig
    | RECEConfig
    | SCEConfig
    | StratifiedConfig
    | SampledSoftmaxConfig
    | BCEConfig
    | GBCEConfig
)


class LossEntry(NamedTuple):
    """A row of the table of losses.

    Args:
        config: its knobs.
        function: the loss itself.
        choose: from a config and a Shape to the knobs and tile that it runs with, and their cost.
    """

    config: type[LossConfig]
    function: Callable[..., Tensor]
    choose: Callable[..., Choice[Any]]


LOSSES: dict[LossName, LossEntry] = {
    "cross_entropy": LossEntry(CrossEntropyConfig, cross_entropy_loss, choose_cross_entropy),
    "rece": LossEntry(RECEConfig, rece_loss, choose_rece),
    "sce": LossEntry(SCEConfig, sce_loss, choose_sce),
    "stratified": LossEntry(StratifiedConfig, stratified_loss, choose_stratified),
    "sampled_softmax": LossEntry(SampledSoftmaxConfig, sampled_softmax_loss, choose_sampled),
    "bce": LossEntry(BCEConfig, bce_loss, choose_sampled),
    "gbce": LossEntry(GBCEConfig, gbce_loss, choose_sampled),
}


@dataclass(frozen=True)
class Loss:
    """A loss with its knobs set: call it with (hidden, weight, labels, **common).

    Args:
        loss_type: its name in LOSSES.
        config: its knobs.
        common: shared options to apply at every call, unless the call gives its own.
    """

    loss_type: LossName
    config: LossConfig
    common: CommonOptions = field(default_factory=CommonOptions)

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor | OutputRows,
        labels: Tensor,
        **common: Unpack[CommonOptions],
    ) -> Tensor:
        """Return the loss; see the function that LOSSES names for shapes and errors."""
        options: dict[str, Any] = {**self.common, **common}
        knobs = asdict(self.config)
        return LOSSES[self.loss_type].function(hidden, weight, labels, **knobs, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return what `build_loss(**d)` takes to make this loss again, ready for JSON."""
        return {"loss_type": self.loss_type, **asdict(self.config), **self.common}


def build_loss(loss_type: str | LossConfig, **knobs: Any) -> Loss:
    """Return the loss of that name with those knobs.

    Args:
        loss_type: a name in LOSSES, or a config object such as RECEConfig(n_rounds=4).
        **knobs: the loss's own knobs and shared options (CommonOptions), except tensors.

    Raises:
        ArgumentError: for an unknown name or knob, or a value out of range; nothing waits for the
            first training step.

    Example:
        >>> build_loss("rece", n_rounds=4, excluded_ids=[0]).to_dict()["n_rounds"]
        4
    """
    name = _name_of(loss_type)
    entry = LOSSES[name]
    own = {item.name for item in fields(entry.config)}
    shared = set(CommonOptions.__annotations__)
    unknown = sorted(set(knobs) - own - shared)
    if unknown or (knobs.keys() & own and not isinstance(loss_type, str)):
        raise ArgumentError(
            "loss knobs",
            unknown or sorted(knobs.keys() & own),
            f"{name} does not take them here",
            f"Pass {', '.join(sorted(own)) or 'no knobs'}, or shared options: "
            f"{', '.join(sorted(shared))}",
        )
    config_knobs = {key: value for key, value in knobs.items() if key in own}
    config = entry.config(**config_knobs) if isinstance(loss_type, str) else loss_type
    common: Any = {key: value for key, value in knobs.items() if key in shared}
    check_sparse_grad(name, Options(**common))
    return Loss(name, config, common)


def _name_of(loss_type: str | LossConfig) -> LossName:
    for name in get_args(LossName):
        if loss_type == name or type(loss_type) is LOSSES[name].config:
            return name  # type: ignore[no-any-return]
    raise ArgumentError(
        "loss_type", loss_type, "no such loss", f"Pass one of {', '.join(get_args(LossName))}"
    )
