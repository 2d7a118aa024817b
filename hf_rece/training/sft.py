"""TRL's supervised fine-tuning by any loss: data, packing and metrics are TRL's."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from hf_rece.errors import ArgumentError
from hf_rece.head import find_head, replace_output_head, restore_output_head
from hf_rece.head.replace import base_model
from hf_rece.losses import build_loss
from hf_rece.training.args import json_object
from hf_rece.training.exact_evaluation import ExactEvaluation, refuse_logits

# TRL's own names: its likelihood is the exact cross-entropy, which dft then weighs.
_OF_TRL = {"nll": "cross_entropy", "dft": "cross_entropy"}


@dataclass
class LargeVocabSFTConfig(SFTConfig):
    """SFTConfig with the training loss.

    Raises:
        ArgumentError: for an unknown loss or knob.
    """

    loss_type: str = field(
        default="stratified",
        metadata={
            "help": "Training loss: cross_entropy, rece, sce, stratified, sampled_softmax, bce or "
            "gbce; or TRL's own nll (cross_entropy) and dft."
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Knobs of the loss as JSON, such as '{\"n_hard\": 512}'."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_kwargs, str):  # from the command line
            self.loss_kwargs = json_object("loss_kwargs", self.loss_kwargs)
        build_loss(_OF_TRL.get(self.loss_type, self.loss_type), **(self.loss_kwargs or {}))
        super().__post_init__()


class LargeVocabSFTTrainer(ExactEvaluation, SFTTrainer):
    """SFTTrainer whose loss never builds logits.

    TRL prepares the data (chat templates, packing, completion-only and assistant-only loss) and
    logs its metrics; entropy and mean_token_accuracy come from the streaming kernel, about the
    classes that the loss scores. TRL's own fused head is not used. Evaluation is exact, see
    ExactEvaluation.

    An adapter on the output layer is refused by TRL; LargeVocabTrainer trains one.

    Args:
        model: as SFTTrainer's. Its output layer is replaced in place, and stays so.
        args: LargeVocabSFTConfig.
        **kwargs: as SFTTrainer's, by name.

    Raises:
        ArgumentError: as replace_output_head and refuse_logits; if args are of another class.
    """

    args: LargeVocabSFTConfig

    def __init__(
        self, model: str | nn.Module, args: LargeVocabSFTConfig | None = None, **kwargs: Any
    ) -> None:
        args = LargeVocabSFTConfig(output_dir="sft") if args is None else args
        if not isinstance(args, LargeVocabSFTConfig):
            raise ArgumentError(
                "args", type(args).__name__, "it names no loss", "Pass a LargeVocabSFTConfig"
            )
        refuse_logits(args, kwargs)
        loss_type = args.loss_type
        # TRL knows two losses by name, and weighs tokens for one of them.
        args.loss_type = "dft" if loss_type == "dft" else "nll"
        try:
            super().__init__(cast("Any", model), args, **kwargs)
        finally:
            args.loss_type = loss_type
        base = base_model(cast("nn.Module", self.model))
        if "_old_forward" not in vars(base):
            del vars(base)["forward"]  # TRL's fused head
        if find_head(base) is not None:
            restore_output_head(base)
        knobs = cast("dict[str, Any]", args.loss_kwargs or {})
        replace_output_head(base, _OF_TRL.get(loss_type, loss_type), **knobs)
        _answer_trl(base)
        self.take_over_metrics()


def _answer_trl(model: Any) -> None:
    """Let `model` answer TRL's request for its fused head, in the place of that head."""
    # Where Accelerate places the model on devices, its own forward must stay around the model's.
    placed = vars(model).get("forward")

    @functools.wraps(type(model).forward)  # Trainer and generate read the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        own = functools.partial(type(self).forward, self) if placed is None else placed
        if not fused_lm_head:
            return own(*args, **kwargs)
        output = own(*args, output_logits=False, output_token_statistics=True, **kwargs)
        # Without shift_labels, TRL expects nothing of the last position, which has no label.
        last = None if kwargs.get("shift_labels") is not None else -1

        def of_labels(values: Tensor) -> Tensor:
            return values[:, :last]

        return FusedCausalLMOutput(
            loss=output.loss,
            log_probs=-of_labels(output.token_losses),
            entropy=of_labels(output.entropy),
            is_top1=of_labels(output.is_top1),
            label_mask=of_labels(output.aligned_labels) != -100,
            aux_loss=output.get("aux_loss"),
        )

    model.forward = types.MethodType(forward, model)
