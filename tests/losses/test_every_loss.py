"""What holds of every loss in the table."""

import inspect
import json
from dataclasses import MISSING, fields
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from hf_rece.errors import ArgumentError
from hf_rece.losses import LOSSES, LossName, build_loss

NAMES = get_args(LossName)
every_loss = pytest.mark.parametrize("name", NAMES)


def seeded():
    return torch.Generator().manual_seed(3)


def value_and_grads(loss, *tensors):
    return loss.detach(), torch.autograd.grad(loss, tensors)


def assert_same(left, right, **tolerance):
    for a, b in zip((left[0], *left[1]), (right[0], *right[1]), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_the_table_has_every_name():
    assert tuple(LOSSES) == NAMES


@every_loss
def test_function_defaults_equal_the_config(name):
    parameters = inspect.signature(LOSSES[name].function).parameters
    for knob in fields(LOSSES[name].config):
        assert knob.default is not MISSING
        assert parameters[knob.name].default == knob.default
        assert knob.metadata["help"]


@every_loss
def test_survives_json(name):
    loss = build_loss(name, excluded_ids=[0], logit_scale=0.5)
    again = build_loss(**json.loads(json.dumps(loss.to_dict())))
    assert again == loss


@every_loss
def test_gradients_pass_gradcheck(name, inputs):
    hidden, weight, labels = inputs(n_tokens=5, n_classes=9, width=3)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    knobs = (
        {"n_negatives": 6}
        if "n_negatives" in inspect.signature(LOSSES[name].function).parameters
        else {}
    )
    loss = build_loss(name, logit_scale=0.7, logit_softcap=4.0, tile_bytes=1, **knobs)

    def function(h, w, b):
        return loss(h, w, labels, bias=b, generator=seeded(), reduction="none")

    assert gradcheck(function, (hidden, weight, bias))


@every_loss
@pytest.mark.parametrize("tile_bytes", [1, 10_000, 200_000])
def test_tile_size_changes_nothing(name, tile_bytes, inputs):
    hidden, weight, labels = inputs(n_tokens=90, n_classes=300, width=6)
    loss = build_loss(name, excluded_ids=[int(i) for i in range(300) if i not in labels][:3])
    whole, tiled = (
        value_and_grads(
            loss(hidden, weight, labels, tile_bytes=size, generator=seeded()), hidden, weight
        )
        for size in (2**30, tile_bytes)
    )
    assert_same(tiled, whole)


@every_loss
def test_ignored_tokens_take_no_part(name, inputs):
    hidden, weight, labels = inputs()
    padded = torch.cat([hidden[:7], torch.full((3, 6), 50.0, dtype=hidden.dtype), hidden[7:]])
    marked = torch.cat([labels[:7], torch.full((3,), -1), labels[7:]])
    loss = build_loss(name)
    plain = loss(hidden, weight, labels, generator=seeded())
    ignoring = loss(padded, weight, marked, ignore_index=-1, generator=seeded())
    assert_same(value_and_grads(ignoring, hidden, weight), value_and_grads(plain, hidden, weight))


@every_loss
def test_all_tokens_ignored_gives_zero_with_a_graph(name, inputs):
    hidden, weight, labels = inputs()
    loss = build_loss(name)(hidden, weight, torch.full_like(labels, -100))
    value, grads = value_and_grads(loss, hidden, weight)
    assert value == 0
    assert all(grad.count_nonzero() == 0 for grad in grads)


@every_loss
@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_a_step_without_any_label_has_loss_zero(name, count, inputs):
    hidden, weight, labels = inputs()
    labels = torch.full_like(labels, -100)
    loss = build_loss(name)(hidden, weight, labels, num_items_in_batch=count)
    assert value_and_grads(loss, hidden)[0] == 0


@every_loss
def test_one_token_is_enough(name, inputs):
    hidden, weight, labels = inputs(n_tokens=1)
    loss = build_loss(name)(hidden, weight, labels)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight)))


@every_loss
def test_two_classes_are_enough(name, inputs):
    hidden, weight, labels = inputs(n_classes=2)
    assert torch.isfinite(build_loss(name)(hidden, weight, labels))


@every_loss
def test_reductions_agree(name, inputs):
    hidden, weight, labels = inputs()
    labels[::5] = -100
    loss = build_loss(name)
    none = loss(hidden, weight, labels, reduction="none", generator=seeded())
    total = loss(hidden, weight, labels, reduction="sum", generator=seeded())
    mean = loss(hidden, weight, labels, generator=seeded())
    by_trainer = loss(hidden, weight, labels, num_items_in_batch=50, generator=seeded())
    assert none.shape == labels.shape
    assert none[::5].count_nonzero() == 0
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(by_trainer, total / 50)
    counted = (none != 0).sum() if name == "sce" else (labels != -100).sum()
    torch.testing.assert_close(mean, total / counted)


@every_loss
def test_leading_dimensions_may_be_two(name, inputs):
    hidden, weight, labels = inputs()
    flat = build_loss(name)(hidden, weight, labels, reduction="none", generator=seeded())
    folded = build_loss(name)(
        hidden.view(4, 6, 6), weight, labels.view(4, 6), reduction="none", generator=seeded()
    )
    torch.testing.assert_close(folded, flat.view(4, 6))


@every_loss
def test_excluded_classes_get_no_gradient(name, inputs):
    hidden, weight, labels = inputs()
    labels[labels < 2] = 2
    loss = build_loss(name, excluded_ids=[0, 1])(hidden, weight, labels)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad[:2].count_nonzero() == 0
    assert grad[2:].count_nonzero() > 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_float32(name, dtype, inputs):
    hidden, weight, labels = inputs(n_tokens=64, n_classes=200, dtype=dtype)
    loss = build_loss(name)(hidden, weight, labels, generator=seeded())
    grads = torch.autograd.grad(loss, (hidden, weight))
    exact_inputs = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    exact = build_loss(name)(*exact_inputs, labels, generator=seeded())
    assert loss.dtype == torch.float32
    # The same float32 arithmetic on the same values: only the returned gradients are rounded.
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(grads, torch.autograd.grad(exact, exact_inputs), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, wanted.to(dtype), rtol=1e-2, atol=1e-5)


@every_loss
@pytest.mark.parametrize(
    ("dtype", "of_bias"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]
)
def test_a_bias_may_have_a_dtype_of_its_own(name, dtype, of_bias, inputs):
    hidden, weight, labels = inputs(dtype=dtype)
    bias = torch.randn(40, dtype=of_bias, requires_grad=True)
    loss = build_loss(name)(hidden, weight, labels, bias=bias, generator=seeded())
    (grad,) = torch.autograd.grad(loss, bias)
    assert grad.dtype == of_bias
    same = bias.detach().to(dtype).requires_grad_()
    wanted = build_loss(name)(hidden, weight, labels, bias=same, generator=seeded())
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, same)[0].to(of_bias))


@every_loss
def test_autocast_does_not_lower_the_precision(name, inputs):
    hidden, weight, labels = inputs(dtype=torch.float32)
    plain = build_loss(name)(hidden, weight, labels, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = build_loss(name)(hidden, weight, labels, generator=seeded())
    torch.testing.assert_close(cast, plain, rtol=1e-6, atol=1e-6)


@every_loss
def test_frozen_rows_get_no_gradient_and_change_no_other(name, inputs):
    hidden, weight, labels = inputs()
    loss = build_loss(name)
    (frozen,) = torch.autograd.grad(
        loss(hidden, weight.detach(), labels, generator=seeded()), hidden
    )
    (trained,) = torch.autograd.grad(loss(hidden, weight, labels, generator=seeded()), hidden)
    torch.testing.assert_close(frozen, trained)


@every_loss
@settings(max_examples=15, deadline=None)
@given(
    n_tokens=st.integers(1, 40),
    n_classes=st.integers(2, 60),
    width=st.integers(1, 9),
    seed=st.integers(0, 999),
    ignored=st.floats(0, 1),
)
def test_any_shape_gives_a_finite_loss_and_gradients(
    name, n_tokens, n_classes, width, seed, ignored
):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, width, generator=draw).requires_grad_()
    weight = torch.randn(n_classes, width, generator=draw).requires_grad_()
    labels = torch.randint(n_classes, (n_tokens,), generator=draw)
    labels[torch.rand(n_tokens, generator=draw) < ignored] = -100
    loss = build_loss(name)(hidden, weight, labels, tile_bytes=1000, generator=draw)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert grads[0][labels == -100].count_nonzero() == 0


# ------------------------------------------------------------------------------------- bad input


@every_loss
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 40])}, r"labels=\[40\].*40 classes"),
        ({"labels": torch.tensor([0, 1, -7])}, r"labels=\[-7\].*ignore_index=-100"),
        ({"labels": torch.tensor([0, 1])}, r"labels=.*shape \(3, 6\)"),
        ({"hidden": torch.randn(3, 5)}, r"hidden=\(3, 5\).*6 wide"),
        ({"hidden": torch.full((3, 6), torch.nan)}, r"hidden='NaN'.*3 of 3 labelled tokens"),
        ({"weight": torch.ones(40)}, "weight=.*row for each class"),
        ({"weight": "lm_head"}, "weight='str'.*OutputRows"),
        ({"bias": torch.ones(3)}, r"bias=\(3,\).*40 classes"),
        ({"excluded_ids": [2]}, r"labels=\[2\].*excluded_ids"),
        ({"excluded_ids": [77]}, r"excluded_ids=\[77\].*40 classes"),
        (
            {"excluded_ids": range(40), "labels": torch.full((3,), -100)},
            "excluded_ids=40: every class",
        ),
        ({"reduction": "median"}, "reduction='median'.*mean, sum or none"),
        ({"backend": "numpy"}, "backend='numpy'.*torch"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0.*None"),
        ({"tile_bytes": 0}, "tile_bytes=0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(name, change, message):
    good = {
        "hidden": torch.randn(3, 6),
        "weight": torch.randn(40, 6),
        "labels": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ArgumentError, match=message):
        build_loss(name)(**{**good, **change})


def test_an_unknown_loss_lists_the_names():
    with pytest.raises(ArgumentError, match=r"loss_type='recee'.*rece, sce"):
        build_loss("recee")


def test_an_unknown_knob_lists_the_knobs():
    with pytest.raises(ArgumentError, match=r"n_round.*n_rounds"):
        build_loss("rece", n_round=3)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("rece", {"n_rounds": 0}),
        ("rece", {"n_extra_chunks": -1}),
        ("rece", {"n_buckets": 2.5}),
        ("sce", {"bucket_size_y": 0}),
        ("stratified", {"n_hard": 0}),
        ("sampled_softmax", {"sampler": "popular"}),
        ("sampled_softmax", {"shared_by": "sequence", "sampler": "in_batch"}),
        ("bce", {"sampler": "in_batch"}),
        ("gbce", {"t": 1.5}),
    ],
)
def test_a_bad_knob_fails_when_the_loss_is_built(name, knobs):
    with pytest.raises(ArgumentError, match=next(iter(knobs))):
        build_loss(name, **knobs)
