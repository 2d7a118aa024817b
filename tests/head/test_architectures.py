"""Every architecture trains with the loss and the gradients of its own dense loss."""

import pytest
import torch

from hf_rece import replace_output_head
from hf_rece.head.replace import kernel_calls
from tests.head.architectures import CAUSAL, MASKED, batch, build
from tests.head.steps import assert_same_step, step


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_loss_and_gradients_are_those_of_the_dense_loss(name):
    model = build(name)
    dense = step(model, batch())
    replace_output_head(model, "cross_entropy")
    assert_same_step(step(model, batch()), dense)
    # The configuration told the shaping: no architecture here needed a second forward pass.
    assert kernel_calls(model) == 1


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
@torch.no_grad()
def test_evaluation_and_generation_stay_bit_equal(name):
    model = build(name).eval()
    ids = batch()["input_ids"]

    def answers():
        labelled, plain = model(**batch()), model(input_ids=ids)
        found = [labelled.loss, labelled.logits, plain.logits]
        if name in CAUSAL:
            found.append(model.generate(ids, max_new_tokens=3, do_sample=False))
        return found

    before = answers()
    replace_output_head(model, "cross_entropy")
    assert all(torch.equal(*pair) for pair in zip(answers(), before, strict=True))


def test_an_unknown_shaping_is_learned_by_one_more_forward_pass():
    model = build("gemma2")
    dense = step(model, batch())
    replace_output_head(model, "cross_entropy")
    state = vars(model)["_large_vocab"]
    state.shaping = type(state.shaping)()
    for calls in (2, 3):
        assert_same_step(step(model, batch()), dense)
        assert kernel_calls(model) == calls
