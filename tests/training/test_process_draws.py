"""Several processes under DDP: what they draw, each sample once, row-sparse gradients."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rece import LargeVocabTrainer, LargeVocabTrainingArguments
from hf_rece.losses import rece, sampled
from hf_rece.ops.lsh import random_directions, shared_directions
from hf_rece.ops.plans import stratified
from hf_rece.training.row_adam import RowAdamW
from tests.processes import in_processes
from tests.training.test_language_model import padded, sequences
from tests.training.test_trainer import make_data, make_trainer

SPARSE = {"n_negatives": 4, "sparse_grad": True}
STEPS = {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.5}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def history(trainer):
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def trained(data, folder, world_size, **arguments):
    trainer = make_trainer(
        data, folder, per_device_train_batch_size=16 // world_size, **{**STEPS, **arguments}
    )
    trainer.train()
    assert trainer.args.world_size == world_size
    if world_size > 1:
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return trainer


# Of each loss its knobs, and which functions make which draws.
DRAWS = {
    "rece": ({"n_buckets": 6}, {"directions": (rece, "random_directions", None)}),
    "stratified": (
        {"n_groups": 4, "n_hard": 4, "n_random": 4},
        {
            "directions": (stratified, "random_directions", None),
            "others": (stratified, "_partition", "members"),
        },
    ),
    "sampled_softmax": ({"n_negatives": 8}, {"others": (sampled, "draw_negatives", "classes")}),
}


def noting(module, name, attribute, into):
    """Patch a function so that what it returns, or an attribute of that, goes into a list."""
    function = getattr(module, name)

    def noting_function(*args, **kwargs):
        result = function(*args, **kwargs)
        into.append(result if attribute is None else getattr(result, attribute))
        return result

    return patch.object(module, name, noting_function)


def draws(data, folder, world_size):
    """Return what each loss draws in two steps, in order."""
    found = {}
    for loss_type, (knobs, functions) in DRAWS.items():
        found[loss_type] = {what: [] for what in functions}
        with ExitStack() as stack:
            for what, where in functions.items():
                stack.enter_context(noting(*where, found[loss_type][what]))
            trained(data, folder, world_size, loss_type=loss_type, loss_kwargs=knobs, max_steps=2)
    return found


def language_model(folder, world_size, **knobs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    args = LargeVocabTrainingArguments(
        str(folder), loss_type="sampled_softmax", loss_kwargs={"n_negatives": 4, **knobs},
        use_cpu=True, disable_tqdm=True, optim="sgd", learning_rate=0.5, max_steps=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, **STEPS,
    )  # fmt: skip
    trainer = LargeVocabTrainer(
        LlamaForCausalLM(config), args, train_dataset=sequences(32), data_collator=padded
    )
    trainer.train()
    return weights(trainer)


def run(rank, folder, world_size):
    data, found = make_data(), {}
    found["epochs"] = {
        strategy: history(trained(data, folder, world_size, train_sampling_strategy=strategy))
        for strategy in ("random", "sequential")
    }
    if world_size == 1:
        return found
    found["draws"] = draws(data, folder, world_size)
    sgd = {"loss_type": "sampled_softmax", "optim": "sgd", "learning_rate": 0.5}
    found["sgd"] = [
        weights(
            trained(
                data, folder, world_size, loss_kwargs=knobs, gradient_accumulation_steps=2, **sgd
            )
        )
        for knobs in ({"n_negatives": 4}, SPARSE)
    ]
    found["language model"] = [
        language_model(folder, world_size, sparse_grad=sparse) for sparse in (False, True)
    ]
    adam = trained(data, folder, world_size, loss_type="sampled_softmax", loss_kwargs=SPARSE)
    assert isinstance(adam.optimizer.optimizer, RowAdamW)
    found["adam"] = weights(adam)
    saving = {"loss_type": "stratified", "save_strategy": "steps", "save_steps": 3}
    whole = trained(data, folder / "whole", world_size, **saving)
    again = make_trainer(
        data, folder / "again", per_device_train_batch_size=16 // world_size, **{**STEPS, **saving}
    )
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    found["resumed"] = weights(whole), weights(again)
    return found


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    return run(0, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return in_processes(run, 2, tmp_path_factory.mktemp("two"), 2)


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_each_sample_counts_once_an_epoch(of_one, of_two, strategy):
    wanted = of_one["epochs"][strategy]
    assert len(wanted) == 8  # two epochs of 61 users, 16 a step: the fourth step has 13
    for found in of_two:
        got = torch.tensor(found["epochs"][strategy])
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["rece", "stratified"])
def test_directions_are_the_same_in_all_processes_and_new_each_step(of_two, loss_type):
    first, second = (found["draws"][loss_type]["directions"] for found in of_two)
    assert len(first) == len(second) >= 2
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)
    assert not any(torch.equal(first[0], later) for later in first[1:])


@pytest.mark.parametrize("loss_type", ["stratified", "sampled_softmax"])
def test_negatives_differ_between_processes_and_steps(of_two, loss_type):
    first, second = (found["draws"][loss_type]["others"] for found in of_two)
    for left, right in zip(first, second, strict=True):
        assert left.shape != right.shape or not torch.equal(left, right)
    assert not any(first[0].equal(later) for later in first[1:])


@pytest.mark.parametrize("kind", ["sgd", "language model"])
def test_row_sparse_gradients_give_the_weights_of_dense_ones(of_two, kind):
    for found in of_two:
        dense, sparse = found[kind]
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "language model", "adam"])
def test_all_processes_end_with_the_same_weights(of_two, kind):
    first, second = (found[kind] for found in of_two)
    runs = zip(first, second, strict=True) if isinstance(first, list) else [(first, second)]
    for left, right in runs:
        for name, weight in left.items():
            assert torch.equal(weight, right[name]), name


def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(of_two):
    for found in of_two:
        whole, again = found["resumed"]
        for name, weight in whole.items():
            assert torch.equal(weight, again[name]), name


def test_directions_follow_from_the_seed_alone():
    hidden = torch.zeros(3, 5)
    with shared_directions(7):
        wanted = random_directions(4, hidden), random_directions(4, hidden)
    torch.rand(3)
    with shared_directions(7):
        assert torch.equal(random_directions(4, hidden), wanted[0])
        given = random_directions(4, hidden, torch.Generator().manual_seed(1))
        assert torch.equal(random_directions(4, hidden), wanted[1])
    assert not torch.equal(wanted[0], wanted[1])
    again = random_directions(4, hidden, torch.Generator().manual_seed(1))
    assert torch.equal(given, again)
