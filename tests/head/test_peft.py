"""Adapters, in both orders of wrapping, against their own dense loss."""

import copy

import pytest
import torch

from hf_rece import ArgumentError, replace_output_head, restore_output_head
from tests.head.architectures import VOCABULARY, batch, build
from tests.head.steps import LargestTensors, assert_same_step, step

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
]

ATTENTION = ["q_proj", "v_proj"]
HEADS = [*ATTENTION, "lm_head"]
TOKENS = [3, 17, 5]


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)


ADAPTERS = {
    "attention": lora(target_modules=ATTENTION),
    "all_linear": lora(target_modules="all-linear"),
    "lm_head": lora(target_modules=HEADS),
    "lm_head_with_bias": lora(target_modules=HEADS, lora_bias=True),
    "rank_stabilised": lora(target_modules=HEADS, use_rslora=True),
    "modules_to_save": lora(target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "modules_to_save_tied": lora(
        target_modules=ATTENTION, modules_to_save=["lm_head"], ensure_weight_tying=True
    ),
    "dora": lora(target_modules=HEADS, use_dora=True),
    "embeddings": lora(target_modules=["embed_tokens"]),
    "embeddings_and_head_tied": lora(
        target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "trainable_tokens": lora(target_modules=ATTENTION, trainable_token_indices=TOKENS),
    "trainable_tokens_of_head": lora(
        target_modules=ATTENTION, trainable_token_indices={"lm_head": TOKENS}
    ),
    "prompt_tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}
MODELS = ("llama", "llama_tied", "gemma2")


def randomised(model):
    """Adapters start as no-ops; give each of their parameters a value that matters."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.2)
    return model


def adapted(model, config):
    return randomised(peft.get_peft_model(model, copy.deepcopy(config))).train()


def assert_adapter_trains_like_dense(name, config):
    dense = step(adapted(build(name), config), batch())
    outside = replace_output_head(adapted(build(name), config), "cross_entropy")
    assert_same_step(step(outside, batch()), dense)
    inside = adapted(replace_output_head(build(name), "cross_entropy"), config)
    assert_same_step(step(inside, batch()), dense)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_trains_like_dense_wrapped_before_or_after(adapter, model):
    assert_adapter_trains_like_dense(model, ADAPTERS[adapter])


def two_adapters(name):
    """A model with two adapters on its head, of which the first is active."""
    model = peft.get_peft_model(build(name), copy.deepcopy(ADAPTERS["lm_head"]))
    model.add_adapter("second", lora(target_modules=HEADS, init_lora_weights=False))
    model.set_adapter("second")
    randomised(model)
    model.set_adapter("default")
    return randomised(model).train()


def assert_copies_train_alike(model, change=lambda model: None):
    dense, replaced = (
        copy.deepcopy(model),
        replace_output_head(copy.deepcopy(model), "cross_entropy"),
    )
    change(dense)
    change(replaced)
    wanted = step(dense, batch())
    assert_same_step(step(replaced, batch()), wanted)
    return wanted[0]


def test_the_adapter_that_is_set_decides():
    model = two_adapters("llama")
    losses = [
        assert_copies_train_alike(model, lambda model, name=name: model.set_adapter(name))
        for name in ("default", "second")
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_two_adapters_add_up():
    model = two_adapters("gemma2")
    one = assert_copies_train_alike(model)
    both = assert_copies_train_alike(
        model, lambda model: model.base_model.set_adapter(["default", "second"])
    )
    assert abs(one - both) > 1e-3


def test_an_adapter_for_each_sequence_needs_logits():
    model = replace_output_head(two_adapters("llama"), "cross_entropy").eval()
    names = {"adapter_names": ["default", "second"]}
    with pytest.raises(ArgumentError, match="adapter_names"):
        model(**batch(), **names, output_logits=False)
    assert model(**batch(), **names).logits is not None


def test_an_adapter_without_a_copy_of_the_head_leaves_the_head_alone():
    model = adapted(build("llama"), ADAPTERS["modules_to_save"])
    model.add_adapter("second", lora(target_modules=ATTENTION, init_lora_weights=False))
    assert_copies_train_alike(model, lambda model: model.set_adapter("second"))


@pytest.mark.parametrize(
    "adapter", ["lm_head", "dora", "modules_to_save", "trainable_tokens_of_head"]
)
def test_a_disabled_adapter_takes_no_part(adapter):
    model = replace_output_head(adapted(build("llama"), ADAPTERS[adapter]), "cross_entropy")
    with model.disable_adapter(), torch.no_grad():
        disabled = model(**batch()).loss
    with torch.no_grad():
        plain = build("llama")(**batch()).loss
        enabled = model(**batch()).loss
    torch.testing.assert_close(disabled, plain)
    assert abs(enabled - plain) > 1e-3


@pytest.mark.parametrize("adapter", ["lm_head", "dora"])
def test_a_merged_adapter_counts_once(adapter):
    model = replace_output_head(adapted(build("llama"), ADAPTERS[adapter]), "cross_entropy")
    with torch.no_grad():
        loss = model(**batch()).loss
        model.merge_adapter()
        torch.testing.assert_close(model(**batch()).loss, loss, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(**batch()).loss, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["lm_head", "dora", "modules_to_save", "trainable_tokens"])
def test_merge_and_unload_leaves_a_replaced_model(adapter):
    model = replace_output_head(adapted(build("llama"), ADAPTERS[adapter]), "cross_entropy")
    with torch.no_grad():
        loss = model(**batch()).loss
        merged = model.merge_and_unload().train()
        output = merged(**batch())
    assert output.logits is None
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-4)
    assert type(restore_output_head(merged)) is type(build("llama"))


def test_dropout_of_an_adapter_on_the_head_drops_what_it_drops_in_dense():
    config = lora(target_modules=["lm_head"], lora_dropout=0.5)
    dropped = assert_copies_train_alike(adapted(build("llama"), config))
    whole = assert_copies_train_alike(
        adapted(build("llama"), lora(target_modules=["lm_head"], lora_dropout=0.0))
    )
    assert abs(dropped - whole) > 1e-4


def test_dora_on_the_head_refuses_dropout_in_training():
    config = lora(target_modules=["lm_head"], use_dora=True, lora_dropout=0.5)
    model = adapted(build("llama"), config)
    with pytest.raises(ArgumentError, match="lora_dropout"):
        replace_output_head(model, "cross_entropy")


def test_dora_with_dropout_evaluates_without_logits():
    config = lora(target_modules=["lm_head"], use_dora=True, lora_dropout=0.5)
    model = adapted(build("llama"), config).eval()
    replace_output_head(model, "cross_entropy")
    with torch.no_grad():
        streamed, dense = (model(**batch(), output_logits=flag).loss for flag in (False, True))
    torch.testing.assert_close(streamed, dense)


def test_dora_beside_another_adapter_is_refused():
    model = peft.get_peft_model(build("llama"), copy.deepcopy(ADAPTERS["dora"]))
    model.add_adapter("second", lora(target_modules=HEADS))
    replace_output_head(model, "cross_entropy")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ArgumentError, match="DoraLinearVariant"):
        model(**batch())


def test_another_variant_of_lora_on_the_head_is_refused_by_name():
    config = lora(target_modules=["lm_head"], alora_invocation_tokens=[4])
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(ArgumentError, match="ALoraLinearVariant"):
        replace_output_head(model, "cross_entropy")


def test_another_adapter_on_the_head_is_refused_by_name():
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=["lm_head"]
    )
    model = peft.get_peft_model(replace_output_head(build("llama"), "cross_entropy"), config)
    with pytest.raises(ArgumentError, match=r"ia3\.layer\.Linear"):
        model.train()(**batch())


SPIED = ["attention", "lm_head", "dora", "modules_to_save", "trainable_tokens_of_head"]


def spied_step(model, monkeypatch):
    """One step in small pieces, every tensor noted."""
    monkeypatch.setattr("hf_rece.embeddings.adapted_rows._ROWS_AT_ONCE", 8)
    replace_output_head(model, "cross_entropy", tile_bytes=2048)
    tokens = batch(n_sequences=4, length=9)
    with LargestTensors(36, VOCABULARY, also=(VOCABULARY, 16)) as seen:
        step(model, tokens)
    return seen


@pytest.mark.parametrize("adapter", SPIED)
def test_no_tensor_of_tokens_times_vocabulary(adapter, monkeypatch):
    assert spied_step(adapted(build("llama"), ADAPTERS[adapter]), monkeypatch).logits == []


@pytest.mark.parametrize("adapter", ["attention", "lm_head", "dora", "trainable_tokens_of_head"])
def test_a_frozen_head_takes_no_memory_for_its_gradient(adapter, monkeypatch):
    made = spied_step(adapted(build("llama"), ADAPTERS[adapter]), monkeypatch).others
    views = {"aten.detach.default", "aten.slice.Tensor", "aten.alias.default", "aten.view.default"}
    assert set(made) <= views
