"""What a model may do to its logits, and what is refused by name."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_rece import ArgumentError, replace_output_head
from hf_rece.head.carrier import LossCarrier
from hf_rece.head.shaping import Operation
from tests.head.architectures import GROUPED, VOCABULARY, batch, prepared
from tests.head.steps import assert_trains_like_dense

N_CLASSES = 7


def carrier(*shape):
    """A carrier of losses (*shape, 1), their labels, and the list that its operations reach."""
    losses, labels = torch.rand(*shape), torch.randint(N_CLASSES, shape)
    reached = []
    carried = LossCarrier.wrap(
        losses.unsqueeze(-1), labels.unsqueeze(-1), N_CLASSES, "Model", reached.append
    )
    return carried, losses, labels, reached


# ------------------------------------------------------------------------------- shapes

RESHAPES = {
    "view": lambda logits: logits.view(-1, N_CLASSES),
    "reshape": lambda logits: logits.reshape(6, N_CLASSES),
    "inferred": lambda logits: logits.view(6, -1),
    "size": lambda logits: logits.view(-1, logits.size(-1)),
    "shape": lambda logits: torch.reshape(logits, (-1, logits.shape[-1])),
    "flatten": lambda logits: logits.flatten(0, 1),
    "dropped": lambda logits: logits[:, :-1],
    "dropped_with_ellipsis": lambda logits: logits[..., :-1, :],
    "last": lambda logits: logits[:, -1, :],
    "chosen": lambda logits: logits[torch.tensor([[True, False, True], [False, True, True]])],
    "whole": lambda logits: logits[:, :, :N_CLASSES].contiguous().float(),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_shapes_are_those_of_logits(name):
    carried, *_ = carrier(2, 3)
    wanted = RESHAPES[name](torch.rand(2, 3, N_CLASSES))
    found = RESHAPES[name](carried)
    assert found.shape == wanted.shape
    assert found.size() == wanted.size()
    assert found.numel() == wanted.numel()
    assert found.dim() == wanted.dim()


@pytest.mark.parametrize("name", RESHAPES)
def test_losses_and_labels_are_reshaped_alike(name):
    carried, losses, labels, _ = carrier(2, 3)
    spread = RESHAPES[name](losses.unsqueeze(-1).repeat(1, 1, N_CLASSES))[..., 0]
    targets = RESHAPES[name](labels.unsqueeze(-1).repeat(1, 1, N_CLASSES))[..., 0].long()
    found = F.cross_entropy(RESHAPES[name](carried), targets, reduction="none")
    assert torch.equal(found, spread)


def test_a_cast_keeps_every_digit():
    carried, losses, labels, _ = carrier(6)
    assert torch.equal(F.cross_entropy(carried.bfloat16(), labels, reduction="none"), losses)


# -------------------------------------------------------------------------- arithmetic

ARITHMETIC = {
    "times": (lambda logits: logits * 3, [Operation("mul", 3.0)]),
    "times_from_the_left": (lambda logits: 3 * logits, [Operation("mul", 3.0)]),
    "times_a_tensor": (lambda logits: torch.tensor(3.0) * logits, [Operation("mul", 3.0)]),
    "by": (lambda logits: logits / 3, [Operation("div", 3.0)]),
    "cap": (
        lambda logits: torch.tanh(logits / 3) * 3,
        [Operation("div", 3.0), Operation("tanh"), Operation("mul", 3.0)],
    ),
    "minus": (lambda logits: -logits, [Operation("neg")]),
    "shift": (lambda logits: logits - 3, [Operation("sub", 3.0)]),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_noted_and_reaches_the_loss(name):
    change, operations = ARITHMETIC[name]
    carried, _, labels, reached = carrier(6)
    F.cross_entropy(change(carried), labels)
    assert reached == [tuple(operations)]


def test_arithmetic_in_place_is_noted_without_its_result():
    carried, _, labels, reached = carrier(6)
    carried.div_(3)
    carried *= 2
    F.cross_entropy(carried, labels)
    assert reached == [(Operation("div", 3.0), Operation("mul", 2.0))]


# -------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_reduces_as_torch_does(reduction):
    logits, labels = torch.randn(6, N_CLASSES), torch.randint(N_CLASSES, (6,))
    labels[2] = -100
    losses = F.cross_entropy(logits, labels, reduction="none")
    carried = LossCarrier.wrap(
        losses.unsqueeze(-1), labels.unsqueeze(-1), N_CLASSES, "Model", lambda operations: None
    )
    wanted = F.cross_entropy(logits, labels, reduction=reduction)
    torch.testing.assert_close(F.cross_entropy(carried, labels, reduction=reduction), wanted)


def test_another_ignore_index_is_understood():
    carried, losses, labels, _ = carrier(6)
    carried.labels[1] = -100
    targets = labels.index_fill(0, torch.tensor(1), 99)
    found = F.cross_entropy(carried, targets, ignore_index=99, reduction="none")
    assert torch.equal(found, losses)


def test_other_labels_are_refused():
    carried, _, labels, _ = carrier(6)
    with pytest.raises(ArgumentError, match="other labels"):
        F.cross_entropy(carried, (labels + 1) % N_CLASSES)


# ---------------------------------------------------------------------------- refusals

SHIFTS = torch.rand(N_CLASSES)
REFUSED = {
    "softmax": lambda logits: logits.softmax(-1),
    "log_softmax": lambda logits: F.log_softmax(logits, -1),
    "clamp": lambda logits: logits.clamp(max=3),
    "max": lambda logits: logits.max(-1),
    "argmax": lambda logits: logits.argmax(-1),
    "topk": lambda logits: logits.topk(2),
    "item": lambda logits: logits[0, 0].item(),
    "transpose": lambda logits: logits.transpose(1, 2),
    "permute": lambda logits: logits.permute(0, 2, 1),
    "squeeze": lambda logits: logits.squeeze(-1),
    "cat": lambda logits: torch.cat([logits, logits], -1),
    "where": lambda logits: torch.where(torch.tensor(True), logits, 0.0),
    "masked_fill": lambda logits: logits.masked_fill(torch.tensor(False), 0.0),
    "new_zeros": lambda logits: logits.new_zeros(3),
    "zeros_like": lambda logits: torch.zeros_like(logits),
    "data": lambda logits: logits.data,
    "T": lambda logits: logits[0].T,
    "matmul": lambda logits: logits @ torch.eye(N_CLASSES),
    "lt": lambda logits: logits < 3,
    "__setitem__": lambda logits: logits.__setitem__((..., [0]), -torch.inf),
    "__set__": lambda logits: setattr(logits, "data", torch.rand(3)),
    r"\[\(Ellipsis, slice": lambda logits: logits[..., :5],
    "add with a tensor": lambda logits: logits + SHIFTS,
    "mul with a tensor": lambda logits: logits * torch.ones(2, 3, 1),
    "mul with a": lambda logits: logits * logits,
    "add with": lambda logits: torch.add(logits, 1, alpha=2),
    "div of a number": lambda logits: torch.div(torch.tensor(2.0), logits),
    "sub of a number": lambda logits: torch.sub(torch.tensor(2.0), logits),
    "rsub": lambda logits: 1 - logits,
    "view": lambda logits: logits.view(-1),
    "reshape": lambda logits: logits.reshape(N_CLASSES, 6),
    "reshape\\(7": lambda logits: logits.reshape(7, -1),
    "flatten": lambda logits: logits.flatten(),
    "weighted": lambda logits: F.cross_entropy(logits[0], torch.zeros(3).long(), weight=SHIFTS),
    "smoothed": lambda logits: F.cross_entropy(
        logits[0], torch.zeros(3).long(), label_smoothing=0.1
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_operation_is_refused_by_name(name):
    with pytest.raises(ArgumentError, match=name):
        REFUSED[name](carrier(2, 3)[0])


def test_a_slice_of_classes_behind_a_mask_is_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="slice"):
        carrier(2, 3)[0][mask, :5]


def test_a_learned_scale_is_refused():
    scale = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ArgumentError, match="mul"):
        carrier(2, 3)[0] * scale


# ------------------------------------------------------------------- models that are refused


def chameleon():
    vq = {"embed_dim": 8, "num_embeddings": 4, "base_channels": 32, "channel_multiplier": [1]}
    names = {"<image>": 98, **{f"IMGIMG{letter}": 90 + n for n, letter in enumerate("ABCD")}}
    config = AutoConfig.for_model(
        "chameleon",
        **{**GROUPED, "num_key_value_heads": 2},
        vq_config={**vq, "latent_channels": 8, "num_res_blocks": 1, "resolution": 8},
        vocabulary_map=names,
    )
    return prepared(AutoModelForImageTextToText.from_config(config))


class SlicingModel(LlamaForCausalLM):
    """Drops padding classes behind its output layer, as Inkling does."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        if logits.shape[-1] > VOCABULARY - 9:
            logits = logits[..., : VOCABULARY - 9]
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return {"loss": loss}


class UnmarkedModel(LlamaForCausalLM):
    """Computes its loss from something else than its output layer."""

    def forward(self, input_ids, labels=None, **kwargs):
        states = self.model(input_ids).last_hidden_state
        return {"loss": self.loss_function(states @ self.lm_head.weight.T, labels, VOCABULARY)}


def refused_in_training(model, match):
    replace_output_head(model, "cross_entropy")
    tokens = batch()
    tokens["input_ids"] = tokens["input_ids"] % 80
    tokens["labels"] = tokens["labels"].masked_fill(tokens["labels"] >= 80, -100)
    with pytest.raises(ArgumentError, match=match):
        model(**tokens)


def test_chameleon_writes_into_its_logits_and_is_refused():
    refused_in_training(chameleon(), "ChameleonForConditionalGeneration.*__setitem__")


def test_a_model_that_drops_classes_is_refused():
    refused_in_training(prepared(SlicingModel(LlamaConfig(**GROUPED))), r"SlicingModel.*slice")


def test_a_model_that_goes_round_its_output_layer_is_refused():
    refused_in_training(prepared(UnmarkedModel(LlamaConfig(**GROUPED))), "does not come from")


class PlainLoop(LlamaForCausalLM):
    """Computes its own shifted cross-entropy, as older models do."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        shifted = logits[..., :-1, :].contiguous()
        loss = torch.nn.CrossEntropyLoss()(
            shifted.view(-1, shifted.size(-1)), labels[..., 1:].contiguous().view(-1)
        )
        return CausalLMOutput(loss=loss, logits=logits)


def test_a_model_with_a_cross_entropy_of_its_own_is_served():
    assert_trains_like_dense(prepared(PlainLoop(LlamaConfig(**GROUPED))), batch())
