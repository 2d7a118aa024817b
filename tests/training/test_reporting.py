"""What a run reports: to TensorBoard, to W&B, and to its own record."""

import json

import pytest
from datasets import Dataset

from hf_rece.training.reporting import TRAINING_RUN
from hf_rece.training.sparsity import DynamicSparsityCallback
from tests.training.test_language_model import language_model, trainer_of
from tests.training.test_trainer import make_data, make_trainer

data = pytest.fixture(make_data, scope="module", name="data")
RUN = {
    "max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
    "include_num_input_tokens_seen": "all",
}  # fmt: skip
REPORTED = {
    *("train/loss", "train/peak_mib", "train/density", "train/ever_active", "train/learning_rate"),
    *("train/num_input_tokens_seen", "train/train_tokens_per_second"),
    *("eval/loss", "eval/ndcg@10", "eval/coverage@5", "test/ndcg@10", "test/loss"),
}


def train(data, folder, **settings):
    callbacks = [DynamicSparsityCallback(0.5, update_interval=2)]
    trainer = make_trainer(data, folder, callbacks=callbacks, **RUN, **settings)
    trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate(data[1]["test"], metric_key_prefix="test")
    return trainer, metrics


def test_tensorboard_gets_metrics_speed_memory_and_density(data, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trainer, metrics = train(data, tmp_path / "run", report_to="tensorboard")
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) >= REPORTED
    before, *during = ((event.step, event.value) for event in events.Scalars("eval/ndcg@10"))
    assert before[0] == 0
    assert during == [
        (log["step"], pytest.approx(log["eval_ndcg@10"]))
        for log in trainer.state.log_history
        if "eval_ndcg@10" in log
    ]
    assert events.Scalars("test/ndcg@10")[0].value == pytest.approx(metrics["test_ndcg@10"])
    assert events.Scalars("train/density")[-1].value == pytest.approx(0.5, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing in the working directory


def test_wandb_gets_metrics_speed_memory_and_density(data, tmp_path, monkeypatch):
    import wandb

    settings = {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path), "DISABLE_GIT": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    _, metrics = train(data, tmp_path / "run", report_to="wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert set(summary) >= REPORTED - {"train/train_tokens_per_second"}
    assert summary["test/ndcg@10"] == pytest.approx(metrics["test_ndcg@10"])


def test_the_record_holds_loss_arguments_cost_and_the_log(data, tmp_path):
    knobs = {"loss_type": "rece", "loss_kwargs": {"n_rounds": 3}, "learning_rate": 0.02}
    trainer = make_trainer(data, tmp_path, **RUN, **knobs)
    trainer.train()
    record = json.loads((tmp_path / TRAINING_RUN).read_text())
    assert (record["loss_type"], record["loss_kwargs"]) == ("rece", {"n_rounds": 3})
    assert (record["arguments"]["learning_rate"], record["steps"]) == (0.02, 4)
    assert record["seconds"] > 0
    assert record["peak_mib"] > 100
    assert record["log_history"] == trainer.state.log_history
    trainer.evaluate(data[1]["test"], metric_key_prefix="test")
    log = json.loads((tmp_path / TRAINING_RUN).read_text())["log_history"]
    assert "test_ndcg@10" in log[-1]


def test_the_record_of_a_language_model_tells_what_it_was_evaluated_on(tmp_path):
    def record(folder, rows):
        texts = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = trainer_of(language_model(), folder, loss_type="sce", max_steps=1)
        trainer.train_dataset = trainer.eval_dataset = texts
        trainer.train()
        return json.loads((folder / TRAINING_RUN).read_text())

    one, same, other = (
        record(tmp_path / name, rows)
        for name, rows in {"a": [[1, 2, 3]], "b": [[1, 2, 3]], "c": [[1, 2, 4]]}.items()
    )
    assert (one["loss_type"], one["sequences"]) == ("sce", 1)
    assert one["evaluated_on"].startswith("1 held-out rows, SHA-256 ")
    assert one["evaluated_on"] == same["evaluated_on"] != other["evaluated_on"]
