"""LargeVocabHead: losses of an output layer, one for each token."""

import pytest
import torch
from torch.nn import functional as F

from hf_rece import ArgumentError, LargeVocabHead, RECEConfig
from hf_rece.head.large_vocab_head import exact_losses, predictions
from hf_rece.head.shaping import Shaping
from hf_rece.losses import LOSSES


@pytest.fixture
def problem():
    layer = torch.nn.Linear(6, 40).double()
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    labels = torch.randint(40, (2, 5))
    labels[0, 1] = -100
    return layer, hidden, labels


@pytest.mark.parametrize("shaping", [Shaping(), Shaping(0.5), Shaping(-2.0), Shaping(1.5, 2.0)])
@pytest.mark.parametrize("compute", [LargeVocabHead("cross_entropy").losses, exact_losses])
def test_exact_losses_are_those_of_dense_logits(compute, shaping, problem):
    layer, hidden, labels = problem
    logits = layer(hidden) * shaping.scale
    if shaping.softcap is not None:
        logits = shaping.softcap * torch.tanh(logits / shaping.softcap)
    wanted = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(compute(layer, hidden, labels, shaping), wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_of_the_labels_shape_and_zero_without_a_label(name, problem):
    layer, hidden, labels = problem
    losses = LargeVocabHead(name).losses(layer, hidden, labels)
    assert losses.shape == labels.shape
    assert losses[0, 1] == 0


def test_the_layer_receives_its_gradient(problem):
    layer, hidden, labels = problem
    LargeVocabHead("cross_entropy").losses(layer, hidden, labels).sum().backward()
    found = [layer.weight.grad.clone(), layer.bias.grad.clone()]
    layer.zero_grad()
    F.cross_entropy(layer(hidden).transpose(1, 2), labels, reduction="sum").backward()
    for got, wanted in zip(found, (layer.weight.grad, layer.bias.grad), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_predictions_are_the_best_classes_and_the_ranks_of_labels(scale, problem):
    layer, hidden, labels = problem
    logits = layer(hidden) * scale
    best, ranks = predictions(layer, hidden, labels, Shaping(scale))
    order = logits.argsort(-1, descending=True)
    places = (order == labels.unsqueeze(-1)).long().argmax(-1) + 1
    labelled = labels != -100
    assert torch.equal(best, order[..., 0].where(labelled, -100))
    assert torch.equal(ranks, places.where(labelled, -100))


def test_knobs_reach_the_loss():
    head = LargeVocabHead("rece", n_rounds=4, tile_bytes=1 << 20)
    assert head.loss.to_dict()["n_rounds"] == 4
    assert head.loss.to_dict()["tile_bytes"] == 1 << 20
    assert "n_rounds" in repr(head)
    budgeted = LargeVocabHead(RECEConfig(memory_budget="2GiB"))
    assert budgeted.loss == LargeVocabHead("rece", memory_budget="2GiB").loss


def test_a_config_object_names_its_loss():
    assert LargeVocabHead(RECEConfig(n_rounds=5)).loss.loss_type == "rece"


@pytest.mark.parametrize(
    ("loss", "knobs", "named"),
    [
        ("reces", {}, "no such loss"),
        ("rece", {"n_round": 1}, "n_round"),
        ("rece", {"reduction": "sum"}, "reduction"),
        ("rece", {"statistics": None}, "statistics"),
        ("rece", {"n_rounds": 0}, "n_rounds"),
    ],
)
def test_a_bad_argument_is_refused_by_name(loss, knobs, named):
    with pytest.raises(ArgumentError, match=named):
        LargeVocabHead(loss, **knobs)
