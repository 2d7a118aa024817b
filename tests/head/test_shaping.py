"""What a model does to its logits, as a scale and a softcap."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from hf_rece import ArgumentError
from hf_rece.head.shaping import Operation, Shaping, shaping_of_config, shaping_of_operations

APPLY = {
    "mul": lambda logits, number: logits * number,
    "div": lambda logits, number: logits / number,
    "add": lambda logits, number: logits + number,
    "sub": lambda logits, number: logits - number,
    "neg": lambda logits, number: -logits,
    "tanh": lambda logits, number: torch.tanh(logits),
}


def shaped(logits, shaping):
    scaled = logits * shaping.scale
    cap = shaping.softcap
    return scaled if cap is None else cap * torch.tanh(scaled / cap)


factors = st.tuples(
    st.sampled_from(["mul", "div"]), st.floats(0.1, 10) | st.floats(-10, -0.1)
) | st.just(("neg", 1.0))
positive_factors = st.tuples(st.sampled_from(["mul", "div"]), st.floats(0.1, 10))
shifts = st.tuples(st.sampled_from(["add", "sub"]), st.floats(-5, 5))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(factors, max_size=4),
    st.one_of(st.none(), st.lists(positive_factors, max_size=3)),
    st.lists(shifts, max_size=2),
)
def test_scales_a_cap_and_shifts_give_the_same_probabilities(before, after, last):
    cap = [] if after is None else [("tanh", 1.0), *after]
    operations = [Operation(*pair) for pair in [*before, *cap, *last]]
    logits = torch.linspace(-3, 3, 9, dtype=torch.float64)
    wanted = logits
    for operation in operations:
        wanted = APPLY[operation.name](wanted, operation.number)
    found = shaped(logits, shaping_of_operations(operations, "Model"))
    torch.testing.assert_close(found.softmax(0), wanted.softmax(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("operations", "named"),
    [
        ([Operation("tanh"), Operation("tanh")], "tanh"),
        ([Operation("add", 1.0), Operation("tanh")], "tanh"),
        ([Operation("tanh"), Operation("neg")], "tanh times -1"),
        ([Operation("exp")], "exp"),
        ([Operation("div", 0.0), Operation("tanh"), Operation("mul", 0.0)], "tanh times 0"),
    ],
)
def test_anything_else_is_refused_by_name(operations, named):
    with pytest.raises(ArgumentError, match=named):
        shaping_of_operations(operations, "Model")


@pytest.mark.parametrize(
    ("model_type", "options", "shaping"),
    [
        ("llama", {}, Shaping()),
        ("gemma2", {"final_logit_softcapping": 30.0}, Shaping(1.0, 30.0)),
        ("recurrent_gemma", {"logits_soft_cap": 20.0}, Shaping(1.0, 20.0)),
        ("granite", {"logits_scaling": 8.0}, Shaping(0.125)),
        ("hyperclovax", {"logits_scaling": 8.0}, Shaping(8.0)),
        ("cohere", {"logit_scale": 0.25}, Shaping(0.25)),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, Shaping(0.5)),
        ("minicpm3", {}, Shaping()),
    ],
)
def test_configurations_tell_the_shaping(model_type, options, shaping):
    assert shaping_of_config(AutoConfig.for_model(model_type, **options)) == shaping


@pytest.mark.parametrize(
    ("other", "close"),
    [
        (Shaping(2.0, 30.0), True),
        (Shaping(2.000001, 30.00001), True),
        (Shaping(2.001, 30.0), False),
        (Shaping(2.0, 30.1), False),
        (Shaping(2.0), False),
    ],
)
def test_shapings_are_compared_up_to_rounding(other, close):
    assert Shaping(2.0, 30.0).is_close(other) == close
