"""replace_output_head and restore_output_head: what they leave alone, and what they refuse."""

import copy
import inspect
import io
import json
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_rece import (
    ArgumentError,
    RECEConfig,
    RecommenderConfig,
    RecommenderModel,
    find_head,
    replace_output_head,
    restore_output_head,
)
from tests.head.architectures import GROUPED, VOCABULARY, WIDE, batch, build, prepared
from tests.head.steps import LargestTensors, assert_same_step, step


def replaced(name, **knobs):
    return replace_output_head(build(name), "cross_entropy", **knobs)


# ------------------------------------------------------------------------------- what stays


def test_forward_without_labels_still_returns_logits_in_training():
    model = build("gemma2")
    ids = batch()["input_ids"]
    dense = model(input_ids=ids).logits
    replace_output_head(model)
    assert torch.equal(model(input_ids=ids).logits, dense)


def test_output_logits_computes_the_models_own_loss_in_training():
    model = build("gemma2")
    dense = model(**batch())
    output = replace_output_head(model)(**batch(), output_logits=True)
    assert torch.equal(output.loss, dense.loss)
    assert torch.equal(output.logits, dense.logits)


def test_evaluation_without_logits_streams_the_exact_loss():
    model = build("gemma2").eval()
    dense = model(**batch()).loss
    output = replace_output_head(model, "rece")(**batch(), output_logits=False)
    torch.testing.assert_close(output.loss, dense)
    assert output.logits is None


@pytest.mark.parametrize("name", ["llama", "llama_tied", "bert"])
def test_saved_checkpoints_are_identical(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "before")
    replace_output_head(model).save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "after").iterdir())
    for file in files:
        contents = [(tmp_path / when / file).read_bytes() for when in ("before", "after")]
        assert contents[0] == contents[1], file
    saved = json.loads((tmp_path / "after" / "config.json").read_text())
    assert saved["architectures"] == [type(build(name)).__name__]


def test_a_checkpoint_of_a_replaced_model_loads_as_the_plain_class(tmp_path):
    model = replaced("llama")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert find_head(loaded) is None
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_keys_of_the_state_dict_stay():
    model = build("llama_tied")
    keys = list(model.state_dict())
    assert list(replace_output_head(model).state_dict()) == keys


def test_tied_weights_stay_tied():
    model = replaced("llama_tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_stay_tied_after_the_vocabulary_grows():
    model = replaced("llama_tied")
    model.resize_token_embeddings(VOCABULARY + 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = copy.deepcopy(model)
    assert_same_step(step(model, batch()), step(restore_output_head(plain), batch()))


def test_the_signature_of_forward_stays():
    assert inspect.signature(replaced("llama").forward) == inspect.signature(build("llama").forward)


def test_restoring_gives_back_the_class_and_the_loss():
    model = build("gemma2")
    dense = step(model, batch())
    attributes = set(vars(model))
    assert restore_output_head(replace_output_head(model)) is model
    assert type(model) is type(build("gemma2"))
    assert set(vars(model)) == attributes
    assert_same_step(step(model, batch()), dense, tolerance=0)


def test_a_restored_model_can_be_replaced_by_another_loss():
    model = replace_output_head(restore_output_head(replaced("llama")), RECEConfig(n_rounds=3))
    assert find_head(model).loss.config.n_rounds == 3


def test_a_replaced_model_is_an_instance_of_its_class():
    model = replaced("llama")
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_deep_copy_is_independent_of_the_original():
    model = replaced("llama_tied")
    twin = copy.deepcopy(model)
    before = step(model, batch())
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    restore_output_head(twin)
    assert_same_step(step(model, batch()), before, tolerance=0)
    assert find_head(model) is not None


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("round_trip", [by_pickle, by_torch_save, copy.deepcopy])
def test_a_whole_model_survives_a_round_trip(round_trip):
    model = replaced("llama_tied")
    twin = round_trip(model)
    assert type(twin) is type(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert_same_step(step(twin, batch()), step(model, batch()), tolerance=0)


# --------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "granite", "mixtral", "bert"])
def test_training_makes_no_tensor_of_tokens_times_vocabulary(name):
    model = replaced(name, tile_bytes=2048)
    with LargestTensors(36, VOCABULARY) as seen:
        step(model, batch(n_sequences=4))
    assert seen.logits == []


def test_the_spy_sees_the_logits_of_dense_training():
    with LargestTensors(36, VOCABULARY) as seen:
        step(build("llama"), batch(n_sequences=4))
    assert seen.logits


def test_a_frozen_plain_head_takes_no_memory_for_its_gradient():
    model = replaced("llama", tile_bytes=2048)
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    with LargestTensors(36, VOCABULARY, also=(VOCABULARY, 16)) as seen:
        step(model, batch(n_sequences=4))
    assert set(seen.others) <= {"aten.detach.default", "aten.alias.default"}


# ------------------------------------------------------------------------------- bad input


def assert_refused(model, match, *arguments, **knobs):
    with pytest.raises(ArgumentError, match=match):
        replace_output_head(model, *arguments, **knobs)


def test_replacing_twice_is_refused():
    assert_refused(replaced("llama"), "replaced already")


def test_restoring_what_was_not_replaced_is_refused():
    with pytest.raises(ArgumentError, match="not replaced"):
        restore_output_head(build("llama"))


SMALL_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def bart():
    return BartForConditionalGeneration(BartConfig(**SMALL_BART))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize("make", [bart, t5])
def test_an_encoder_decoder_is_refused(make):
    assert_refused(make(), "encoder-decoder")


def test_a_decoder_with_labels_that_it_does_not_shift_is_refused_in_training():
    model = replace_output_head(BartForCausalLM(BartConfig(**SMALL_BART)), "cross_entropy")
    with pytest.raises(ArgumentError, match="other labels"):
        model.train()(**batch())


@pytest.mark.parametrize("model_class", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_output_layer_is_refused(model_class):
    assert_refused(model_class(LlamaConfig(**GROUPED)), "no output layer")


def test_a_recommender_is_refused():
    config = RecommenderConfig(vocab_size=VOCABULARY, backbone=LlamaConfig(**GROUPED).to_dict())
    assert_refused(RecommenderModel(config), "without logits already")


def test_something_else_than_a_model_of_transformers_is_refused():
    assert_refused(nn.Linear(4, 9), "model of transformers")


def test_an_unknown_loss_is_refused():
    assert_refused(build("llama"), "no such loss", "reces")


def test_an_unknown_knob_is_refused():
    assert_refused(build("llama"), "n_round", "rece", n_round=3)


@pytest.mark.parametrize(
    "knob",
    [{"reduction": "sum"}, {"ignore_index": 0}, {"logit_softcap": 3.0}, {"logit_scale": 2.0},
     {"num_items_in_batch": 3}, {"bias": None}],
)  # fmt: skip
def test_a_knob_that_the_model_sets_itself_is_refused(knob):
    assert_refused(build("llama"), "the model and its labels decide", "rece", **knob)


def test_a_refused_model_stays_as_it_was():
    model = build("llama")
    assert_refused(model, "n_round", "rece", n_round=3)
    assert type(model) is LlamaForCausalLM
    assert find_head(model) is None


class QuantisedLayer(nn.Module):
    """Stands for a layer of bitsandbytes: an int8 weight and a forward of its own."""

    def __init__(self):
        super().__init__()
        codes = torch.zeros(VOCABULARY, 16, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, hidden):
        return hidden @ self.weight.to(hidden.dtype).T


class ScaledLayer(nn.Linear):
    """An output layer that does something of its own."""

    def forward(self, hidden):
        return super().forward(hidden) * 2


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (QuantisedLayer(), "quantised"),
        (ScaledLayer(16, VOCABULARY), "ScaledLayer"),
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, VOCABULARY)), "Sequential"),
    ],
)
def test_an_output_layer_that_is_no_plain_linear_is_refused_by_name(layer, match):
    model = build("llama")
    model.set_output_embeddings(layer)
    assert_refused(model, match)


def test_labels_beyond_the_vocabulary_are_refused():
    tokens = batch()
    tokens["labels"][0, 5] = VOCABULARY
    with pytest.raises(ArgumentError, match=rf"labels=\[{VOCABULARY}\]"):
        replaced("llama")(**tokens)


def test_a_model_that_scores_a_part_of_its_positions_is_refused_in_training():
    config = AutoConfig.for_model("modernbert", **WIDE, sparse_prediction=True)
    config._attn_implementation = "eager"
    model = replace_output_head(prepared(AutoModelForMaskedLM.from_config(config)))
    with pytest.raises(ArgumentError, match=r"scores positions of shape \(14,\)"):
        model(**batch())


def test_a_failed_step_leaves_the_output_layer_as_it_was():
    model = replaced("llama")
    attributes = set(vars(model.lm_head))
    tokens = batch()
    tokens["labels"][0, 5] = VOCABULARY
    with pytest.raises(ArgumentError):
        model(**tokens)
    assert set(vars(model.lm_head)) == attributes
    assert model(input_ids=tokens["input_ids"]).logits.shape[-1] == VOCABULARY
