"""The SASRec backbone."""

import pytest
import torch

from hf_rece.errors import ArgumentError
from hf_rece.models.sasrec import SASRecConfig, SASRecModel
from tests.checkpointing import enable_checkpointing


def make(**knobs):
    torch.manual_seed(0)
    config = SASRecConfig(vocab_size=30, hidden_size=16, max_position_embeddings=12, **knobs)
    return SASRecModel(config).eval()


def states(model, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_future_does_not_leak(attention, norm_first):
    model = make(norm_first=norm_first, attn_implementation=attention)
    ids = torch.randint(1, 30, (2, 8))
    changed = ids.clone()
    changed[:, 5:] = 1
    torch.testing.assert_close(states(model, ids)[:, :5], states(model, changed)[:, :5])
    assert not torch.allclose(states(model, ids)[:, 5:], states(model, changed)[:, 5:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_changes_nothing(attention):
    model = make(attn_implementation=attention)
    ids = torch.randint(1, 30, (1, 5))
    plain = states(model, ids)
    zeros, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    right = states(model, torch.cat([ids, zeros], 1), torch.cat([ones, zeros], 1))[:, :5]
    left = states(model, torch.cat([zeros, ids], 1), torch.cat([zeros, ones], 1))[:, 3:]
    torch.testing.assert_close(right, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left, plain, atol=1e-5, rtol=1e-5)


def test_eager_and_sdpa_agree():
    ids = torch.randint(1, 30, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    one, other = (states(make(attn_implementation=kind), ids, mask) for kind in ("sdpa", "eager"))
    torch.testing.assert_close(one[mask == 1], other[mask == 1], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    ids = torch.randint(1, 30, (2, 8))
    grads = []
    for checkpointing in (False, True):
        model = make(dropout=0.0).train()
        if checkpointing:
            enable_checkpointing(model)
        states(model, ids).square().sum().backward()
        grads.append(model.embed_tokens.weight.grad)
    torch.testing.assert_close(*grads)


def test_outputs_hidden_states_and_attentions():
    model = make(attn_implementation="eager")
    output = model(
        input_ids=torch.randint(1, 30, (2, 8)), output_hidden_states=True, output_attentions=True
    )
    assert len(output.hidden_states) == 3
    assert [weights.shape for weights in output.attentions] == [(2, 2, 8, 8)] * 2


def test_survives_saving(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = SASRecModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 30, (2, 8))
    torch.testing.assert_close(states(again, ids), states(model, ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    "knobs", [{"num_attention_heads": 3}, {"hidden_act": "swish"}], ids=lambda k: next(iter(k))
)
def test_bad_configurations_are_named(knobs):
    with pytest.raises(ArgumentError, match=next(iter(knobs))):
        SASRecConfig(hidden_size=16, **knobs)


def test_too_long_sequences_are_refused():
    with pytest.raises(ArgumentError, match=r"\(1, 13\).*max_position_embeddings is 12"):
        states(make(), torch.ones(1, 13, dtype=torch.long))
