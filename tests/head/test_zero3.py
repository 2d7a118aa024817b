"""A replaced head reads its rows where ZeRO-3 has them."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rece import replace_output_head
from tests.zero3 import Zero3


def language_model(tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


OF_TOKENS = {"output_logits": False, "output_token_statistics": True}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options_and_loss",
    [({}, lambda output: output.loss), (OF_TOKENS, lambda o: o.token_losses.sum() / 16)],
    ids=["loss", "token_losses"],
)
def test_loss_and_gradients_are_those_of_the_dense_model(tied, options_and_loss):
    options, loss_of = options_and_loss
    plain = language_model(tied).train()
    model = replace_output_head(copy.deepcopy(plain), "cross_entropy").train()
    zero3 = Zero3(model)
    ids = torch.randint(101, (2, 9))
    losses = [
        plain(input_ids=ids, labels=ids).loss,
        loss_of(model(input_ids=ids, labels=ids, **options)),
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            zero3.gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )


def test_evaluation_needs_no_logits():
    plain = replace_output_head(language_model(tied=False), "stratified").eval()
    cut = copy.deepcopy(plain)
    Zero3(cut)
    ids = torch.randint(101, (2, 9))
    with torch.no_grad():
        got, wanted = (
            m(input_ids=ids, labels=ids, output_logits=False, output_predictions=True)
            for m in (cut, plain)
        )
    torch.testing.assert_close(got.loss, wanted.loss)
    assert torch.equal(got.label_ranks, wanted.label_ranks)
