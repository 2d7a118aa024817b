"""Recommenders read their rows where ZeRO-3 has them, in training and when they answer."""

import copy

import pytest
import torch
from transformers import LlamaConfig

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from tests.zero3 import NOT_AVAILABLE, Zero3

TABLES = {
    "dense": None,
    "composed": {"type": "compositional", "compression": 3, "operation": "mult", "codes": "id"},
    "codes": {"type": "compositional", "compression": 2, "codes": "given", "n_codes": 2},
    "lma": {"type": "lma", "compression": 2},
}
BACKBONES = {
    "sasrec": lambda: SASRecConfig(hidden_size=16, num_hidden_layers=1, dropout=0.0),
    "without a last norm": lambda: SASRecConfig(
        hidden_size=16, num_hidden_layers=1, dropout=0.0, norm_first=False
    ),
    "llama": lambda: LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ),
}
every_model = pytest.mark.parametrize(
    ("table", "backbone", "tied"),
    [
        *((table, "sasrec", tied) for table in TABLES for tied in (True, False)),
        ("dense", "without a last norm", True),
        ("dense", "llama", True),
    ],
)


def two_models(table, backbone, tied, **settings):
    """Return a model, and a copy whose weights ZeRO-3 has taken away."""
    torch.manual_seed(0)
    config = RecommenderConfig(
        backbone=BACKBONES[backbone](),
        vocab_size=60,
        item_embedding=TABLES[table],
        tie_word_embeddings=tied,
        output_bias=True,
        **settings,
    )
    whole = RecommenderModel(config)
    whole.tokenizer = ItemTokenizer(items=[f"i{n}" for n in range(1, 60)])
    cut = copy.deepcopy(whole)
    return whole, cut, Zero3(cut)


def batch():
    ids = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


@every_model
@pytest.mark.parametrize("loss_type", ["cross_entropy", "stratified"])
def test_loss_and_gradients_are_those_of_whole_weights(table, backbone, tied, loss_type):
    whole, cut, zero3 = two_models(table, backbone, tied, loss_type=loss_type)
    losses = []
    for model in (whole, cut):
        torch.manual_seed(1)
        losses.append(model.train()(**batch()).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    assert set(zero3.gradients) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(zero3.gradients[name], gradient, msg=name)


@every_model
def test_answers_are_those_of_whole_weights(table, backbone, tied):
    whole, cut, _ = two_models(table, backbone, tied)
    with torch.no_grad():
        got, wanted = (m.eval()(**batch(), rank_k=5) for m in (cut, whole))
    for name in ("losses", "greater", "tied", "topk_ids"):
        torch.testing.assert_close(got[name], wanted[name])
    histories = [["i3", "i4"], ["i5"]]
    assert cut.recommend(histories, k=4) == whole.recommend(histories, k=4)
    torch.testing.assert_close(cut.item_vectors(), whole.item_vectors())


def test_weights_that_were_taken_away_cannot_be_read():
    _, cut, _ = two_models("dense", "sasrec", True)
    assert {p.ds_status for p in cut.parameters()} == {NOT_AVAILABLE}
    with pytest.raises((IndexError, RuntimeError)):
        cut.output_terms().rows.rows(torch.tensor([3]))
