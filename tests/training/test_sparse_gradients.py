"""Trainer with row-sparse gradients."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.training.args import LargeVocabTrainingArguments
from hf_rece.training.row_adam import RowAdamW
from hf_rece.training.sparsity import DynamicSparsityCallback
from hf_rece.training.trainer import LargeVocabTrainer
from tests.training.test_trainer import make_data, make_trainer

SPARSE = {"n_negatives": 4, "sparse_grad": True}
data = pytest.fixture(make_data, scope="module", name="data")


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_sgd_gives_the_weights_of_dense_gradients(data, tmp_path):
    results = []
    for knobs in ({"n_negatives": 4}, SPARSE):
        trainer = make_trainer(
            data, tmp_path, loss_type="sampled_softmax", loss_kwargs=knobs, optim="sgd",
            gradient_accumulation_steps=2, max_grad_norm=0.5, learning_rate=0.5,
        )  # fmt: skip
        trainer.train()
        results.append(weights(trainer))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_adamw_becomes_row_adamw_and_learns(data, tmp_path):
    trainer = make_trainer(
        data, tmp_path, loss_type="sampled_softmax", loss_kwargs=SPARSE, num_train_epochs=5
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, RowAdamW)
    assert trainer.evaluate()["eval_loss"] < before - 0.2


def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(data, tmp_path):
    settings = {"loss_type": "sampled_softmax", "loss_kwargs": SPARSE, "save_steps": 4}
    whole = make_trainer(data, tmp_path / "whole", **settings)
    whole.train()
    again = make_trainer(data, tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)


def test_an_untied_language_model_trains(tmp_path):
    config = LlamaConfig(
        vocab_size=80, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    ids = torch.randint(80, (8, 6))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = LargeVocabTrainingArguments(
        str(tmp_path), loss_type="sampled_softmax", loss_kwargs=SPARSE, max_steps=3, use_cpu=True,
        learning_rate=0.1, weight_decay=0.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = LargeVocabTrainer(LlamaForCausalLM(config), args, train_dataset=rows)
    before = weights(trainer)["lm_head.weight"]
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, RowAdamW)
    assert (weights(trainer)["lm_head.weight"] != before).any()


def test_other_optimizers_are_refused_before_work(data, tmp_path):
    trainer = make_trainer(
        data, tmp_path, loss_type="sampled_softmax", loss_kwargs=SPARSE, optim="adafactor"
    )
    with pytest.raises(ArgumentError, match=r"optim.*no sparse gradients"):
        trainer.train()


def test_dense_training_is_left_as_it_was(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=1)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


def test_dynamic_sparsity_is_refused(data, tmp_path):
    with pytest.raises(ArgumentError, match="sparse_grad"):
        make_trainer(
            data, tmp_path, loss_type="sampled_softmax", loss_kwargs=SPARSE,
            callbacks=[DynamicSparsityCallback()],
        )  # fmt: skip


def test_compressed_tables_are_refused():
    with pytest.raises(ArgumentError, match=r"sparse_grad.*compressed tables"):
        RecommenderConfig(
            vocab_size=50, item_embedding={"type": "lma", "compression": 4}, loss_type="sce",
            loss_kwargs={"sparse_grad": True},
        )  # fmt: skip


def test_input_and_output_share_one_sparse_gradient():
    config = RecommenderConfig(
        vocab_size=500, loss_type="sampled_softmax", loss_kwargs=SPARSE, tie_word_embeddings=True
    )
    model = RecommenderModel(config)
    ids = torch.randint(1, 500, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.item_head.weight.grad
    assert gradient.is_sparse
    assert set(ids.unique().tolist()) <= set(gradient.coalesce().indices()[0].tolist())
