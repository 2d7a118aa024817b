"""The same seed gives the same training, to the bit, with or without a break."""

import random
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_rece.losses import LossName
from hf_rece.training.args import LargeVocabTrainingArguments
from hf_rece.training.sparsity import DynamicSparsityCallback
from hf_rece.training.trainer import LargeVocabTrainer
from tests.training.test_trainer import make_data, make_trainer

data = pytest.fixture(make_data, scope="module", name="data")

KNOBS = {
    "stratified": {"n_hard": 6, "n_random": 6, "n_groups": 3},
    "sampled_softmax": {"n_negatives": 12},
    "bce": {"n_negatives": 12},
    "gbce": {"n_negatives": 12},
}
VARIANTS = {
    **{name: {"loss_type": name, "loss_kwargs": KNOBS.get(name)} for name in get_args(LossName)},
    "row-sparse": {
        "loss_type": "sampled_softmax",
        "loss_kwargs": {"n_negatives": 12, "sparse_grad": True},
    },
    "accumulated": {"loss_type": "rece", "gradient_accumulation_steps": 3},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "loader processes": {"dataloader_num_workers": 1},
    "dynamic sparsity": {"density": 0.4},
    "evaluating": {"eval_strategy": "steps", "eval_steps": 2, "loss_type": "stratified"},
}
SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
ALWAYS = {"cross_entropy", "stratified", "sce", "grouped by length", "dynamic sparsity"}


class Noting:
    """Collator that notes the users of each batch."""

    def __init__(self, collator):
        self.collator, self.seen = collator, []

    def __call__(self, rows):
        self.seen.append([tuple(row["item_ids"]) for row in rows])
        return self.collator(rows)


def run(data, folder, variant, resume=None):
    """Train with dropout, and resume in another state of the random numbers."""
    settings = {**SETTINGS, **VARIANTS[variant]}
    density = settings.pop("density", None)
    callbacks = [DynamicSparsityCallback(density, update_interval=2)] if density else []
    trainer = make_trainer(data, folder, **settings, callbacks=callbacks)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    trainer.data_collator = Noting(trainer.data_collator)
    if resume:  # a checkpoint brings its own state of all generators
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(5)
    trainer.train(resume_from_checkpoint=resume)
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return trainer, losses


def assert_same(one, other):
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    "variant",
    [each if each in ALWAYS else pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS],
)
def test_training_again_and_resuming_give_the_same_to_the_bit(variant, data, tmp_path):
    first, losses = run(data, tmp_path / "a", variant)
    second, again = run(data, tmp_path / "b", variant)
    resumed, rest = run(data, tmp_path / "c", variant, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert losses == again == rest
    assert_same(first.model, second.model)
    assert_same(first.model, resumed.model)
    if variant != "loader processes":  # which note in their own memory
        assert first.data_collator.seen == second.data_collator.seen
        n_skipped = len(first.data_collator.seen) - len(resumed.data_collator.seen)
        assert first.data_collator.seen[-2:] == resumed.data_collator.seen[-2:]
        assert 0 <= n_skipped < len(first.data_collator.seen)


def test_a_process_of_several_resumes_the_order_of_its_epoch(data, tmp_path):
    def batches(epoch, n_skipped):
        trainer = make_trainer(data, tmp_path, train_sampling_strategy="group_by_length")
        loader = DataLoader(range(70), batch_size=4, sampler=trainer._get_train_sampler())
        loader = prepare_data_loader(loader, num_processes=2, process_index=1)
        trainer._order.set_epoch(epoch)
        return [batch.tolist() for batch in skip_first_batches(loader, n_skipped)]

    assert batches(0, 0) != batches(1, 0)
    assert batches(1, 3) == batches(1, 0)[3:]


@pytest.mark.parametrize("loss_type", ["cross_entropy", "stratified"])
def test_a_language_model_trains_the_same_to_the_bit(loss_type, tmp_path):
    rows = torch.randint(0, 64, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})

    def train(folder, resume=None):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, attention_dropout=0.1,
        )  # fmt: skip
        arguments = LargeVocabTrainingArguments(
            output_dir=str(tmp_path / folder),
            loss_type=loss_type,
            per_device_train_batch_size=4,
            use_cpu=True,
            disable_tqdm=True,
            **SETTINGS,
        )
        trainer = LargeVocabTrainer(
            LlamaForCausalLM(config),
            arguments,
            train_dataset=dataset,
            data_collator=default_data_collator,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    first = train("a")
    assert_same(first, train("b"))
    assert_same(first, train("c", resume=str(tmp_path / "a" / "checkpoint-3")))
