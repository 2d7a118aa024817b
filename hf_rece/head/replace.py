"""Take the output layer out of any causal or masked LM, in place, and put it back.

While the model's own forward runs, the one call of its output layer returns losses in the place of
logits (carrier.py). Everything before and after that call stays the model's: labels, scaling,
auxiliary losses, reduction. The layer's weights are read inside its own call, where sharding,
offloading and adapters have them ready.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_rece.embeddings.as_rows import as_rows
from hf_rece.embeddings.gathered import forward_replaced
from hf_rece.errors import ArgumentError
from hf_rece.head.carrier import LossCarrier
from hf_rece.head.large_vocab_head import LargeVocabHead, exact_losses, predictions
from hf_rece.head.outputs import without_logits
from hf_rece.head.shaping import Operation, Shaping, shaping_of_config, shaping_of_operations
from hf_rece.losses import LossConfig
from hf_rece.ops.stream import TokenStatistics

_STATE = "_large_vocab"
# Marks a forward on the instance that calls the one of its class, whatever that is at the time.
CALLS_ITS_CLASS = "_calls_its_class"
_MASKED = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())


class _State:
    """What a replaced model remembers.

    Attributes:
        head: the training loss.
        shaping: what the model does to its logits, as far as known.
        calls: how often the output layer's losses were computed.
    """

    def __init__(self, head: LargeVocabHead, shaping: Shaping) -> None:
        self.head, self.shaping, self.calls = head, shaping, 0


class _Wanted(NamedTuple):
    """What a call of forward asks for beside the loss."""

    statistics: bool
    predictions: bool


class _Call:
    """What one call of forward carries from the output layer to its end.

    Attributes:
        labels: of each position, aligned; -100 for none.
        wanted: beside the loss.
        applied: what the model did to its logits before it asked for the loss.
        notes: tensors for its output, by their names in TOKEN_FIELDS.
    """

    def __init__(self, labels: Tensor, wanted: _Wanted) -> None:
        self.labels, self.wanted = labels, wanted
        self.applied: list[tuple[Operation, ...]] = []
        self.notes: dict[str, Tensor] = {}


def replace_output_head(
    model: nn.Module, loss: str | LossConfig = "stratified", **knobs: Any
) -> nn.Module:
    """Train `model` by a loss that never builds its logits; works in place.

    In training with labels, forward returns the loss and no logits. Everything else is as before:
    forward without labels or in evaluation, generate, state_dict, save_pretrained, tied weights.
    More arguments of forward choose otherwise:

        output_logits: True computes the model's own loss and logits in training too; False in
            evaluation returns the exact cross-entropy, streamed, without logits.
        output_token_statistics: without logits, add to the output aligned_labels, and token_losses,
            entropy (nats) and is_top1 of the same shape: at each position, about the label that it
            predicts.
        output_predictions: without logits, add predicted_ids and label_ranks (from 1) likewise,
            -100 where there is no label.

    The loss goes through the model's own reduction, with its labels, scaling, softcap and auxiliary
    losses. Losses of SCE are averaged over all labelled tokens, and not only over those in buckets.

    torch.compile of the whole model leaves such training steps uncompiled; compile its decoder
    instead: `model.get_decoder().compile()`.

    Args:
        model: a causal or masked LM of transformers, or a PEFT model of one; wrap before or after.
        loss: a name in LOSSES, or a config object such as RECEConfig(n_rounds=4).
        **knobs: see LargeVocabHead.

    Returns:
        `model`, for chaining.

    Raises:
        ArgumentError: for an encoder-decoder, a model without output layer, one that is replaced
            already, a quantised output layer or an unknown one, unknown knobs. In training: if the
            model does to its logits what cannot be reproduced; the message names it.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(
        ...     hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
        ... )
        >>> model = replace_output_head(AutoModelForCausalLM.from_config(config), "stratified")
        >>> ids = torch.arange(6).view(1, 6)
        >>> model.train()(input_ids=ids, labels=ids).logits is None
        True
    """
    base = base_model(model)
    head = LargeVocabHead(loss, **knobs)
    _check_model(base)
    vars(base)[_STATE] = _State(head, shaping_of_config(base.config))
    _set_class(base, _replaced_class(cast("Any", type(base))))
    return model


def restore_output_head(model: nn.Module) -> nn.Module:
    """Undo replace_output_head, in place; return `model`.

    Raises:
        ArgumentError: if the model's head is not replaced.
    """
    base = base_model(model)
    if find_head(base) is None:
        raise ArgumentError(
            "model", type(base).__name__, "its head is not replaced", "Leave it as it is"
        )
    _set_class(base, type(base).__mro__[1])
    del vars(base)[_STATE]
    if hasattr(vars(base).get("forward"), CALLS_ITS_CLASS):
        del vars(base)["forward"]
    return model


def change_head_loss(model: nn.Module, loss: str | LossConfig, **knobs: Any) -> None:
    """Train a replaced model by another loss; whatever wraps it stays.

    Args:
        model: as replace_output_head returned it, or prepared for training since.
        loss: as for replace_output_head.
        **knobs: likewise.

    Raises:
        ArgumentError: for an unknown loss or knob.
    """
    vars(base_model(model))[_STATE].head = LargeVocabHead(loss, **knobs)


def find_head(model: nn.Module) -> LargeVocabHead | None:
    """Return the head that replaces the output layer of `model`, None if there is none."""
    state = vars(base_model(model)).get(_STATE)
    return None if state is None else state.head


def kernel_calls(model: nn.Module) -> int:
    """Return how often a replaced model has computed its loss without logits."""
    return int(vars(base_model(model))[_STATE].calls)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()  # type: ignore[return-value]


def _set_class(model: PreTrainedModel, model_class: type[Any]) -> None:
    # Accelerate, where it places a model on devices, keeps the forward that it found.
    if "_old_forward" in vars(model):
        vars(model)["_old_forward"] = types.MethodType(model_class.forward, model)
    model.__class__ = model_class


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            "model",
            name,
            "no model of transformers",
            "Pass a causal or masked LM before it is compiled or wrapped for several processes, "
            "or call a loss function on its hidden states",
        )
    if "forward" in vars(model) and "_old_forward" not in vars(model):
        raise ArgumentError(
            "model",
            name,
            "its forward was replaced on the instance, around which no head can be put",
            "Call replace_output_head first, and whatever patches or prepares the model after it",
        )
    if find_head(model) is not None:
        raise ArgumentError(
            "model", name, "its head is replaced already", "Call restore_output_head(model) first"
        )
    if hasattr(model.config, "loss_kwargs"):
        raise ArgumentError(
            "model", name, "it trains without logits already", "Set loss_type in its configuration"
        )
    if model.config.is_encoder_decoder:
        raise ArgumentError(
            "model",
            name,
            "an encoder-decoder shifts its labels in its own way",
            "Pass a causal or masked LM",
        )
    layer = model.get_output_embeddings()
    if layer is None or "labels" not in inspect.signature(type(model).forward).parameters:
        raise ArgumentError(
            "model",
            name,
            "it has no output layer over its vocabulary that takes labels",
            "Load it by AutoModelForCausalLM or AutoModelForMaskedLM",
        )
    parameter = next((p for p in layer.parameters() if p.dim() == 2), None)
    as_rows(
        layer, torch.empty(0) if parameter is None else parameter.new_empty(0, parameter.shape[1])
    )


# -------------------------------------------------------------------------------- the replacement


@functools.cache
def _replaced_class(model_class: Any) -> Any:
    """Return `model_class` with a forward that trains without logits."""

    class Replaced(model_class):
        @functools.wraps(model_class.forward)  # Trainer and generate read the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output_logits = kwargs.pop("output_logits", None)
            wanted = _Wanted(
                kwargs.pop("output_token_statistics", False),
                kwargs.pop("output_predictions", False),
            )
            labels = _aligned_labels(model_class, args, kwargs)
            if output_logits is None:
                output_logits = not self.training
            if labels is None or output_logits:
                return model_class.forward(self, *args, **kwargs)
            call = _Call(labels, wanted)
            return _forward_without_logits(self, model_class, call, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _new, (model_class,), dict(vars(self))

    # Checkpoints name the class of the model that they hold.
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Replaced, name, getattr(model_class, name))
    return Replaced


def _new(model_class: type[PreTrainedModel]) -> Any:
    replaced = _replaced_class(cast("Any", model_class))
    return replaced.__new__(replaced)


def _aligned_labels(
    model_class: type[PreTrainedModel], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the label of each position, as the model will use it; None without labels."""
    names = list(inspect.signature(model_class.forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    labels: Tensor | None = given.get("labels")
    shifted: Tensor | None = given.get("shift_labels")
    if labels is not None and shifted is not None:
        return shifted
    if labels is None or any(parent.__name__ in _MASKED for parent in model_class.__mro__):
        return labels
    return F.pad(labels, (0, 1), value=-100)[..., 1:]


@torch.compiler.disable  # a compiled graph holds no LossCarrier; a compiled decoder inside stays
def _forward_without_logits(
    model: Any,
    model_class: type[PreTrainedModel],
    call: _Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    state: _State = vars(model)[_STATE]
    for _ in range(2):
        call.applied.clear()
        with _losses_for_logits(model, model_class, call):
            output = model_class.forward(model, *args, **kwargs)
        if not call.applied:
            raise ArgumentError(
                "model",
                model_class.__name__,
                "its loss does not come from the logits of its output layer",
                "Train it with its own loss: restore_output_head(model)",
            )
        found, *more = (shaping_of_operations(o, model_class.__name__) for o in call.applied)
        if all(shaping.is_close(state.shaping) for shaping in (found, *more)):
            return without_logits(output, call.notes)
        # The configuration did not tell; the forward pass has, so once more with that.
        state.shaping = found
    raise ArgumentError(
        "model",
        model_class.__name__,
        "what it does to its logits changes from call to call",
        "Train it with its own loss: restore_output_head(model)",
    )


@contextmanager
def _losses_for_logits(
    model: Any, model_class: type[PreTrainedModel], call: _Call
) -> Iterator[None]:
    """Let the output layer's call return losses in the place of logits."""
    state: _State = vars(model)[_STATE]
    layer = model.get_output_embeddings()

    def losses_in_place_of_logits(hidden: Tensor, *more: Any, **options: Any) -> LossCarrier:
        if more or options:
            raise ArgumentError(
                "output layer",
                sorted(options) or len(more),
                f"{model_class.__name__} calls it with more than the hidden states",
                "Leave the argument out, or pass output_logits=True",
            )
        state.calls += 1
        labels = call.labels.to(hidden.device)
        if hidden.shape[:-1] != labels.shape:
            raise ArgumentError(
                "labels",
                tuple(labels.shape),
                f"the output layer scores positions of shape {tuple(hidden.shape[:-1])}",
                "Pass a label for each of them, -100 for none; with logits_to_keep, for the "
                "positions that are kept",
            )
        compute = state.head.losses if model.training else exact_losses
        statistics = TokenStatistics() if call.wanted.statistics else None
        losses = compute(layer, hidden, labels, state.shaping, statistics)
        if statistics is not None:
            call.notes["aligned_labels"] = labels
            call.notes["entropy"], call.notes["is_top1"] = statistics.entropy, statistics.is_top1
        if call.wanted.predictions:
            best, ranks = predictions(layer, hidden, labels, state.shaping)
            call.notes["predicted_ids"], call.notes["label_ranks"] = best, ranks
        n_classes = as_rows(layer, hidden[:0]).rows.n_rows
        name = model_class.__name__
        return LossCarrier.wrap(
            losses.unsqueeze(-1), labels.unsqueeze(-1), n_classes, name, call.applied.append
        )

    def note_losses(_layer: nn.Module, _inputs: Any, output: LossCarrier) -> None:
        call.notes["token_losses"] = output.plain().squeeze(-1)

    # After the hooks by which ZeRO-3 and FSDP2 bring the weights back for the backward pass.
    noting = layer.register_forward_hook(note_losses) if call.wanted.statistics else nullcontext()
    with noting, forward_replaced(layer, losses_in_place_of_logits):
        yield
