"""Steps with numbers that are not finite."""

import json
from itertools import pairwise
from typing import get_args

import pytest
import torch
from transformers import TrainerCallback

from hf_rece.errors import ArgumentError, NonfiniteError
from hf_rece.losses import LossName, build_loss
from hf_rece.losses.watching import watch_states
from hf_rece.training.args import LargeVocabTrainingArguments
from tests.processes import findings_of_two_processes
from tests.training.test_trainer import make_data, make_trainer

data = pytest.fixture(make_data, scope="module", name="data")
SHORT = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no"}


def break_batches(trainer, numbers, value=torch.nan):
    """Multiply the hidden states of some micro-batches, counted from 1, by NaN or infinity."""
    seen = []

    def hook(module, args, output):
        if module.training:
            seen.append(module)
            if len(seen) in numbers:
                output.last_hidden_state = output.last_hidden_state * value
        return output

    trainer.model.backbone.register_forward_hook(hook)
    return trainer


def weights_of(trainer):
    return [weight.detach().clone() for weight in trainer.model.parameters()]


# ------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_training_stops_before_the_weights_change(data, value, tmp_path):
    trainer = break_batches(make_trainer(data, tmp_path, **SHORT), {3}, value)
    with pytest.raises(NonfiniteError, match=r"step 3: the hidden states that the loss reads"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_table_whose_gradient_is_not_finite_is_named(data, max_grad_norm, tmp_path):
    trainer = make_trainer(data, tmp_path, **SHORT, max_grad_norm=max_grad_norm)
    weight = trainer.model.backbone.norm.weight
    weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonfiniteError, match=r"gradients of backbone\.norm\.weight are not finite"):
        trainer.train()


def test_weights_that_are_not_finite_are_named(data, tmp_path):
    trainer = make_trainer(data, tmp_path, **SHORT)
    trainer.model.get_input_embeddings().weight.data[5] = torch.inf
    with pytest.raises(NonfiniteError, match=r"step 1: the weights .*\.weight are not finite\. Go"):
        trainer.train()


def test_a_loss_of_finite_states_is_told_from_them(data, tmp_path):
    trainer = make_trainer(data, tmp_path, **SHORT)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * torch.inf
    with pytest.raises(NonfiniteError, match="the loss is not finite; its hidden states and"):
        trainer.train()


def test_gradients_that_only_together_are_too_large_are_told(data, tmp_path):
    trainer = make_trainer(data, tmp_path, **SHORT)
    for weight in trainer.model.parameters():
        weight.register_hook(lambda grad: torch.full_like(grad, 1e19))
    with pytest.raises(NonfiniteError, match="the norm of all gradients is not finite; each is"):
        trainer.train()


# ------------------------------------------------------------------------------------------- skip


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_skipped_step_changes_no_weight_and_is_counted(data, value, tmp_path):
    settings = {**SHORT, "nonfinite_loss": "skip"}
    trainer = break_batches(make_trainer(data, tmp_path, **settings), {2, 4}, value)
    seen = []

    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights_of(trainer))

    trainer.add_callback(Notes())
    trainer.train()
    assert trainer.state.global_step == len(seen) == 5
    changed = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in pairwise(seen)
    ]
    assert changed == [False, True, False, True]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log.get("skipped_steps") for log in logs] == [None, 1, 1, 2, 2]
    assert trainer.skipped_steps == 2
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in logs)


def test_one_bad_micro_batch_skips_the_whole_step(data, tmp_path):
    settings = {**SHORT, "nonfinite_loss": "skip", "gradient_accumulation_steps": 2}
    trainer = break_batches(make_trainer(data, tmp_path, **settings), {1})
    trainer.train()
    assert trainer.skipped_steps == 1
    assert next(log["step"] for log in trainer.state.log_history if "skipped_steps" in log) == 1


def test_the_count_outlives_the_process(data, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    settings = {**SHORT, **saving, "nonfinite_loss": "skip"}
    break_batches(make_trainer(data, tmp_path, **settings), {2}).train()
    resumed = break_batches(make_trainer(data, tmp_path, **settings), {1})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.skipped_steps == 2
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert [log["skipped_steps"] for log in state["log_history"] if "skipped_steps" in log][-1] == 2


def test_skipping_stops_where_it_cannot_help(data, tmp_path):
    trainer = make_trainer(data, tmp_path, **SHORT, nonfinite_loss="skip")
    trainer.model.get_input_embeddings().weight.data[5] = torch.nan
    with pytest.raises(NonfiniteError, match="the weights"):
        trainer.train()


def test_row_sparse_gradients_are_looked_at_too(data, tmp_path):
    settings = {
        **SHORT,
        "loss_type": "sampled_softmax",
        "loss_kwargs": {"sparse_grad": True, "n_negatives": 8},
        "nonfinite_loss": "skip",
    }
    trainer = break_batches(make_trainer(data, tmp_path, **settings), {2})
    trainer.train()
    assert trainer.skipped_steps == 1
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # C++, and torch
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", get_args(LossName))
def test_every_loss_of_states_that_are_not_finite_is_not_finite(name, value, dtype, inputs):
    hidden, weight, labels = inputs(n_tokens=40, n_classes=60, dtype=dtype)
    hidden.data[7:9] = value
    with watch_states() as watch:
        loss = build_loss(name)(hidden, weight, labels)
        loss.backward()
    assert not watch.finite
    assert not loss.isfinite() or not hidden.grad.isfinite().all()


def test_outside_of_a_trainer_a_loss_refuses_nan(inputs):
    hidden, weight, labels = inputs()
    hidden.data[0] = torch.nan
    with pytest.raises(ArgumentError, match="hidden='NaN'"):
        build_loss("rece")(hidden, weight, labels)


# -------------------------------------------------------------------------------------- arguments


def test_unknown_answers_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="nonfinite_loss='ignore'"):
        LargeVocabTrainingArguments(output_dir=str(tmp_path), nonfinite_loss="ignore")


# ------------------------------------------------------------------------------- several processes


def findings(folder, world):
    """Return, of a process whose first rank alone meets NaN, how both ways of going on end."""
    import torch.distributed as dist

    settings = {**SHORT, "max_steps": 3, "per_device_train_batch_size": 4}
    found = []
    for choice in ("skip", "stop"):
        trainer = make_trainer(make_data(), folder, **settings, nonfinite_loss=choice)
        if dist.get_rank() == 0:
            break_batches(trainer, {2})
        try:
            trainer.train()
            message = ""
        except NonfiniteError as error:
            message = str(error)
        weights = sum(float(p.detach().double().sum()) for p in trainer.model.parameters())
        found.append([trainer.skipped_steps, message, weights])
    return found


def test_processes_agree(tmp_path):
    first, second = findings_of_two_processes("tests.training.test_finite_steps", tmp_path)
    assert first == second
    (skipped, nothing, _), (_, message, _) = first
    assert (skipped, nothing) == (1, "")
    assert "step 2: the hidden states that the loss reads are not finite in 1 of 2" in message
