"""A replaced head under FSDP2: sharded weights, hooks on what each module returns."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rece import replace_output_head
from hf_rece.head.replace import kernel_calls


@pytest.fixture
def process_group():
    """One process that shards over itself, with every hook and copy of FSDP2."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def language_model(tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def shard(model, unit):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    units = {
        "head": [model.lm_head],
        "tail": [[model.model.norm, model.lm_head]],  # as Accelerate does
        "root": [],
    }[unit]
    for part in units:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("unit", "tied"), [("head", False), ("tail", False), ("root", False), ("root", True)]
)
@pytest.mark.usefixtures("process_group")
def test_gradients_are_those_of_the_whole_weights(unit, tied):
    ids = torch.randint(101, (2, 9))
    plain = language_model(tied).train()
    wanted = plain(input_ids=ids, labels=ids).loss
    wanted.backward()
    model = replace_output_head(language_model(tied), "cross_entropy").train()
    shard(model, unit)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert kernel_calls(model) == 1
    torch.testing.assert_close(loss, wanted)
    for sharded, whole in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("process_group")
def test_evaluation_needs_no_logits():
    ids = torch.randint(101, (2, 9))
    model = replace_output_head(language_model(tied=False), "stratified").eval()
    wanted = model(input_ids=ids, labels=ids).loss
    shard(model, "tail")
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, output_logits=False)
    assert output.logits is None
    torch.testing.assert_close(output.loss, wanted)
