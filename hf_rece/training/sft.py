"""TRL's supervised fine-tuning by any loss: data, packing and metrics are TRL's."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from hf_rece.errors import ArgumentError
from hf_rece.head.outputs import TOKEN_FIELDS
from hf_rece.head.replace import CALLS_ITS_CLASS, base_model
from hf_rece.training.args import LargeVocabTrainingArguments
from hf_rece.training.checkpoints import WholeCheckpoints
from hf_rece.training.exact_evaluation import ExactEvaluation, refuse_logits
from hf_rece.training.finite_steps import FiniteSteps
from hf_rece.training.process_draws import ProcessDraws
from hf_rece.training.sample_order import SampleOrder
from hf_rece.training.sharded_models import ShardedModels
from hf_rece.training.sparse_gradients import SparseGradients
from hf_rece.training.trainer import set_loss

# TRL's own names: its likelihood is the exact cross-entropy, which dft then weighs.
_OF_TRL = {"nll": "cross_entropy", "dft": "cross_entropy"}
_LENGTHS = "row_lengths"


@dataclass(repr=False)
class LargeVocabSFTConfig(SFTConfig, LargeVocabTrainingArguments):
    """SFTConfig with the training loss and its knobs, as in LargeVocabTrainingArguments.

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

    __repr__ = LargeVocabTrainingArguments.__repr__  # SFTConfig's shows the Hub's token

    @property
    def loss_of_head(self) -> str:
        """Name in LOSSES of what the head computes."""
        return _OF_TRL.get(self.loss_type, self.loss_type)


class LargeVocabSFTTrainer(  # type: ignore[misc]
    WholeCheckpoints,
    SampleOrder,
    FiniteSteps,
    ProcessDraws,
    SparseGradients,
    ShardedModels,
    ExactEvaluation,
    SFTTrainer,
):
    """SFTTrainer whose loss never builds logits.

    TRL prepares the data (chat templates, packing, completion-only and assistant-only loss) and
    logs its metrics; entropy and mean_token_accuracy come from the streaming kernel, about the
    classes that the loss scores (bce and gbce have no entropy: NaN). TRL's own fused head is not
    used. Evaluation is exact, see ExactEvaluation; rows that were joined without padding count one
    by one.

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
        _remove_head_of_trl(base)
        set_loss(base, args)
        _answer_trl(base)
        self.take_over_metrics()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the evaluation batches."""
        with self._noting_lengths():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return the batches of predict."""
        with self._noting_lengths():
            return super().get_test_dataloader(test_dataset)

    def token_output(self, model: nn.Module, inputs: dict[str, Any], wants_ids: bool) -> Any:
        """Return a batch's output with fields (rows, T) about its tokens; note TRL's metrics."""
        lengths = inputs.pop(_LENGTHS, None)
        if self.aux_loss_enabled:
            inputs = {**inputs, "output_router_logits": True}
        output = super().token_output(model, inputs, wants_ids)
        metrics = self._metrics["eval"]
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            of_batches = self.accelerator.gather_for_metrics(output.aux_loss)
            metrics["aux_loss"].append(of_batches.mean().item())
        if lengths is not None:
            for name in [name for name in TOKEN_FIELDS if name in output]:
                output[name] = _separate(output[name], lengths.tolist())
        return output

    @contextmanager
    def _noting_lengths(self) -> Iterator[None]:
        """Let data loaders made meanwhile tell the length of each row that they join to others.

        The last batch repeats rows of other processes, which are to be left out again.
        """
        collator = self.data_collator
        if self.padding_free:
            self.data_collator = _NotingLengths(collator)
        try:
            yield
        finally:
            self.data_collator = collator


@dataclass
class _NotingLengths:
    """Collator that adds the length of each row to the batch."""

    collator: Callable[..., Any]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**self.collator(rows), _LENGTHS: lengths}


def _separate(values: Tensor, lengths: list[int]) -> Tensor:
    """Return values (1, T) of rows that were joined as (rows, longest)."""
    filler = 0 if values.is_floating_point() or values.dtype == torch.bool else -100
    parts = values[0, : sum(lengths)].split(lengths)
    return pad_sequence(parts, batch_first=True, padding_value=filler)


def _remove_head_of_trl(model: nn.Module) -> None:
    """Take off `model` the fused head that SFTTrainer has put around its forward."""
    # Where Accelerate placed the model on devices, TRL's forward is what leads to Accelerate's.
    if "_old_forward" in vars(model):
        return
    del vars(model)["forward"]
    # With it goes the autocast of an earlier training: Accelerate is to put it on again.
    if vars(model).pop("_original_forward", None) is not None:
        vars(model).pop("_is_accelerate_prepared", None)


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

    if placed is None:
        setattr(forward, CALLS_ITS_CLASS, True)
    model.forward = types.MethodType(forward, model)
