"""PEFT's wrappers of one layer as rows: logits and gradients against PEFT's own forward."""

import pytest
import torch
from torch import nn

from hf_rece.embeddings.as_rows import as_rows

peft = pytest.importorskip("peft")


class Model(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=bias)

    def forward(self, hidden):
        return self.head(self.body(hidden))


CONFIGS = {
    "lora": {"target_modules": ["head"]},
    "rank_stabilised": {"target_modules": ["head"], "use_rslora": True},
    "dora": {"target_modules": ["head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["body"], "modules_to_save": ["head"]},
    "trainable_tokens": {
        "target_modules": ["body"],
        "trainable_token_indices": {"head": [7, 2, 9]},
    },
}


def wrapped(name, bias=False, dtype=torch.float64):
    config = peft.LoraConfig(r=2, lora_alpha=3, **CONFIGS[name])
    model = peft.get_peft_model(Model(bias).to(dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def logits_of(layer, hidden):
    terms = as_rows(layer, hidden)
    everything = slice(0, terms.rows.n_rows)
    logits = terms.hidden @ terms.rows.rows(everything).T
    return logits if terms.bias is None else logits + terms.bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_the_layer(name, bias):
    model = wrapped(name, bias)
    layer = model.base_model.model.head
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    found, wanted = logits_of(layer, hidden), layer(hidden)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    results = [
        torch.autograd.grad((y * weights).sum(), [hidden, *trained]) for y in (found, wanted)
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_that_are_frozen_stay_frozen(name):
    model = wrapped(name)
    terms = as_rows(model.base_model.model.head, torch.randn(5, 6, dtype=torch.float64))
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert all(not t.requires_grad for t in terms.rows.tensors() if id(t) in frozen)


@pytest.mark.parametrize("name", CONFIGS)
def test_disabled_adapters_leave_the_layer_beneath(name):
    model = wrapped(name)
    hidden = torch.randn(5, 6, dtype=torch.float64)
    layer = model.base_model.model.head
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(layer, hidden), layer(hidden))


def test_an_active_adapter_without_a_copy_leaves_the_layer_as_it_was():
    layer = wrapped("modules_to_save").base_model.model.head
    layer._active_adapter = ["another"]
    hidden = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(logits_of(layer, hidden), layer(hidden))


def test_an_adapter_in_float32_on_a_bfloat16_layer_keeps_the_layers_dtype():
    model = wrapped("lora", dtype=torch.bfloat16)
    layer = model.base_model.model.head
    layer.lora_A.float()
    layer.lora_B.float()
    terms = as_rows(layer, torch.randn(5, 6, dtype=torch.bfloat16))
    assert terms.hidden.dtype == torch.bfloat16
