"""Ways to train: what a training loop passes and wraps, against the dense loss."""

import inspect

import accelerate
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BertForMaskedLM

from hf_rece import ArgumentError, replace_output_head
from hf_rece.head.replace import kernel_calls
from tests.checkpointing import enable_checkpointing
from tests.head.architectures import GROUPED, VOCABULARY, batch, build, prepared
from tests.head.steps import assert_same_step, assert_trains_like_dense, step

SOME = ("llama", "llama_tied", "gemma2", "granite", "mixtral", "gpt2", "bert")


def replaced(name):
    return replace_output_head(build(name), "cross_entropy")


# ------------------------------------------------------------------------- arguments of forward


@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
@pytest.mark.parametrize("name", SOME)
def test_num_items_in_batch_divides_the_sum(name, count):
    assert_trains_like_dense(build(name), batch(), num_items_in_batch=count)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_shift_labels_are_taken_as_they_are(name):
    labels = batch()["labels"]
    aligned = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flip(0)
    assert_trains_like_dense(build(name), batch(), shift_labels=aligned)


def test_shift_labels_alone_give_no_loss_as_in_dense():
    tokens = batch()
    output = replaced("llama")(input_ids=tokens["input_ids"], shift_labels=tokens["labels"])
    assert output.loss is None
    assert output.logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("kept", [4, torch.tensor([1, 2, 6, 7])], ids=["last", "chosen"])
def test_logits_to_keep_with_labels_of_the_kept_positions(kept):
    tokens = batch()
    positions = torch.arange(9)[-kept:] if isinstance(kept, int) else kept
    aligned = torch.nn.functional.pad(tokens["labels"], (0, 1), value=-100)[:, 1:][:, positions]
    assert_trains_like_dense(build("llama"), tokens, logits_to_keep=kept, shift_labels=aligned)


def test_logits_to_keep_with_other_labels_is_refused():
    with pytest.raises(ArgumentError, match="logits_to_keep"):
        replaced("llama")(**batch(), logits_to_keep=4)


def test_positional_labels():
    model = build("llama")
    order = ["self", *inspect.signature(model.forward).parameters]
    tokens = batch()
    arguments = [tokens.get(name) for name in order[1 : order.index("labels") + 1]]
    dense = model(*arguments).loss
    output = replace_output_head(model, "cross_entropy")(*arguments)
    torch.testing.assert_close(output.loss, dense)
    assert output.logits is None


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_a_tuple_is_returned_without_logits(name):
    model = build(name)
    dense = model(**batch(), return_dict=False)
    output = replace_output_head(model, "cross_entropy")(**batch(), return_dict=False)
    assert len(output) == len(dense)
    torch.testing.assert_close(output[0], dense[0])
    assert None in output[1:3]


def test_hidden_states_are_returned_as_in_dense():
    model = build("llama")
    dense = model(**batch(), output_hidden_states=True).hidden_states
    replace_output_head(model, "cross_entropy")
    found = model(**batch(), output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(found, dense, strict=True))


class OwnBert(BertForMaskedLM):
    """A masked LM under a name that transformers does not know."""


def test_a_subclass_of_a_masked_model_keeps_its_labels_unshifted():
    assert_trains_like_dense(prepared(OwnBert(build("bert").config)), batch())


def test_the_auxiliary_loss_of_experts_is_added_by_the_model():
    model = build("mixtral")
    dense = model(**batch())
    output = replace_output_head(model, "cross_entropy")(**batch())
    assert torch.equal(output.aux_loss, dense.aux_loss)
    torch.testing.assert_close(output.loss, dense.loss)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_without_any_label_the_loss_is_zero_with_a_graph(name):
    model = replaced(name)
    tokens = batch()
    tokens["labels"].fill_(-100)
    loss, gradients = step(model, tokens)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values() if gradient is not None)
    assert gradients[next(iter(gradients))] is not None


def test_an_attention_mask_is_respected():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    assert_trains_like_dense(build("llama"), batch(), attention_mask=mask)


def test_packed_sequences_are_told_apart_by_their_positions():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    tokens = batch(n_sequences=1, length=12)
    tokens["labels"] = tokens["input_ids"].masked_fill(positions == 0, -100)
    model = build("llama")
    assert_trains_like_dense(model, tokens, position_ids=positions)
    apart = torch.arange(12).unsqueeze(0)
    replace_output_head(model, "cross_entropy")
    losses = [model(**tokens, position_ids=p).loss for p in (positions, apart)]
    assert abs(losses[0] - losses[1]) > 1e-5


def test_embeddings_may_stand_for_token_ids():
    model = build("llama")
    tokens = batch()
    states = model.get_input_embeddings()(tokens["input_ids"]).detach()
    assert_trains_like_dense(model, {"inputs_embeds": states, "labels": tokens["labels"]})


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "bert"])
def test_bfloat16_weights_train_at_least_as_exactly_as_dense(name):
    exact = step(build(name).double(), batch())
    half = build(name).bfloat16()
    dense = step(half, batch())
    found = step(replace_output_head(half, "cross_entropy"), batch())

    def distance(other):
        pairs = ((exact[1][key], value) for key, value in other[1].items())
        return sum((value.double() - wanted).square().sum() for wanted, value in pairs).sqrt()

    assert abs(found[0] - exact[0]) <= abs(dense[0] - exact[0]) + 2e-3
    assert distance(found) <= 1.2 * distance(dense)
    assert all(value.dtype == torch.bfloat16 for value in found[1].values())


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_autocast_trains_like_dense(name):
    model = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_trains_like_dense(model, batch(), tolerance=2e-2)


def test_the_loss_is_float32_with_bfloat16_weights():
    model = replace_output_head(build("llama").bfloat16(), "cross_entropy")
    assert model(**batch()).loss.dtype == torch.float32


# ------------------------------------------------------------------------------------- wrapping


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing(name, use_reentrant):
    model = build(name)
    enable_checkpointing(model, {"use_reentrant": use_reentrant})
    assert_trains_like_dense(model, batch())


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_weights_that_are_offloaded_until_the_layers_own_call(name):
    dense = build(name)(**batch()).loss
    model = accelerate.cpu_offload(replaced(name))
    assert model.lm_head.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).loss, dense)
    assert kernel_calls(model) == 1


def test_a_head_may_be_replaced_after_offloading():
    dense = build("llama")(**batch()).loss
    model = replace_output_head(accelerate.cpu_offload(build("llama")), "cross_entropy")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).loss, dense)
    assert kernel_calls(model) == 1


def test_a_dispatched_model_trains_like_dense():
    dense = step(build("llama"), batch())
    model = accelerate.dispatch_model(
        replaced("llama"), device_map={"": "cpu"}, main_device="cpu", force_hooks=True
    )
    assert_same_step(step(model, batch()), dense)


def whole_model(model, backend):
    return torch.compile(model, backend=backend)


def decoder_alone(model, backend):
    model.get_decoder().compile(backend=backend)
    return model


@pytest.fixture
def compiled_graphs():
    """Return a function that counts the graphs compiled so far in this test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


# Dynamo warns itself.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("compiled", "name", "backend"),
    [
        (whole_model, "llama", "aot_eager"),
        (whole_model, "gemma2", "eager"),
        (decoder_alone, "llama", "aot_eager"),
    ],
)
def test_a_compiled_step_trains_like_dense(compiled, name, backend, compiled_graphs):
    dense = step(build(name), batch())
    model = compiled(replaced(name), backend)
    loss, gradients = step(model, batch())
    named = {key.removeprefix("_orig_mod."): value for key, value in gradients.items()}
    assert_same_step((loss, named), dense)
    assert compiled is whole_model or compiled_graphs()


def test_a_hook_on_the_output_layer_still_runs():
    model = replaced("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    model(**batch())
    assert seen == [(2, 9, VOCABULARY)]


def test_a_hook_that_doubles_the_logits_is_reproduced():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 2)
    assert_trains_like_dense(model, batch())


def test_a_parametrised_output_layer_trains_like_dense():
    model = build("llama")
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    assert_trains_like_dense(model, batch())


# ------------------------------------------------------------------------- images and text

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE_TOKEN = 98


def llava():
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **GROUPED},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE_TOKEN,
    )
    return prepared(AutoModelForImageTextToText.from_config(config))


def qwen2_vl():
    text = {"model_type": "qwen2_vl_text", **GROUPED}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision)
    return prepared(AutoModelForImageTextToText.from_config(config))


@pytest.mark.parametrize("make", [llava, qwen2_vl])
def test_a_vision_language_model_trains_like_dense_on_text(make):
    assert_trains_like_dense(make(), batch())


def test_a_vision_language_model_trains_like_dense_on_an_image():
    tokens = batch()
    tokens["input_ids"][:, 1:5] = IMAGE_TOKEN
    tokens["labels"][:, 1:5] = -100
    assert_trains_like_dense(llava(), tokens, pixel_values=torch.randn(2, 3, 8, 8))
