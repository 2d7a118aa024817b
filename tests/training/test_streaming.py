"""Training on a prepared log: the batches, the metrics and the resumption of the way in memory."""

from pathlib import Path

import pytest
import torch

from hf_rece.data.interactions import load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.prepared import RowGroup, open_prepared
from hf_rece.data.splits import leave_one_out_split
from hf_rece.data.stream import SequenceStream
from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.trainer import RecommenderTrainer, most_popular_metrics
from tests.processes import findings_of_two_processes


class Recorder(RecommenderTrainer):
    """A trainer that keeps the inputs of its steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs["attention_mask"].bool()
        rows = zip(inputs["input_ids"], mask, strict=True)
        self.seen.append([row[real].tolist() for row, real in rows])
        return super().training_step(model, inputs, *args, **kwargs)


def make_trainer(prepared, folder, train=None, **arguments):
    torch.manual_seed(0)
    tokenizer = prepared.tokenizer
    backbone = SASRecConfig(hidden_size=8, max_position_embeddings=20, dropout=0.0)
    model = RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=len(tokenizer)))
    model.tokenizer = tokenizer
    if train is None:
        train = SequenceStream(prepared.split("train"), buffer_size=16)
    settings = {
        "output_dir": str(folder),
        "max_length": 20,
        "ranking_ks": [5, 10],
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return Recorder(
        model,
        RecommenderTrainingArguments(**settings),
        train_dataset=train,
        eval_dataset=prepared.split("validation"),
    )


def flat(batches):
    return [row for batch in batches for row in batch]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_batches_and_weights_are_those_of_the_way_in_memory(prepared, tmp_path):
    split = prepared.split("train")
    on_disk = make_trainer(prepared, tmp_path, SequenceStream(split, shuffle=False), max_steps=12)
    in_memory = make_trainer(
        prepared,
        tmp_path,
        split.in_memory(),
        max_steps=12,
        train_sampling_strategy="sequential",
    )
    for left, right in zip(
        on_disk.get_train_dataloader(), in_memory.get_train_dataloader(), strict=True
    ):
        assert set(left) == set(right)
        assert all(torch.equal(left[name], right[name]) for name in left)
    on_disk.train()
    in_memory.train()
    assert on_disk.seen == in_memory.seen
    assert torch.equal(weights(on_disk), weights(in_memory))


def test_metrics_are_those_of_the_splits_in_memory(prepared, tmp_path):
    log = load_interactions(prepared.path.parent / "log.parquet")
    splits = leave_one_out_split(log, ItemTokenizer.from_interactions(log))
    trainer = make_trainer(prepared, tmp_path)
    wanted = trainer.evaluate(splits["validation"])
    found = trainer.evaluate()
    ranking = [name for name in wanted if "@" in name or name == "eval_loss"]
    assert {n: found[n] for n in ranking} == pytest.approx({n: wanted[n] for n in ranking})
    baselines = [
        most_popular_metrics(train, test, len(prepared.tokenizer) - 1, ks=[10])
        for train, test in (
            (splits["train"], splits["test"]),
            (trainer.train_dataset, prepared.split("test")),
        )
    ]
    assert baselines[1] == pytest.approx(baselines[0])


def test_epochs_and_steps_are_known_beforehand(prepared, tmp_path):
    trainer = make_trainer(prepared, tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    batches = -(-len(prepared.split("train")) // 6)
    assert trainer.state.max_steps == 2 * -(-batches // 2)
    assert len(trainer.seen) == 2 * batches
    epochs = trainer.seen[:batches], trainer.seen[batches:]
    assert sorted(flat(epochs[0])) == sorted(flat(epochs[1]))
    assert epochs[0] != epochs[1]
    assert trainer.num_examples(trainer.get_train_dataloader()) == len(prepared.split("train"))


@pytest.mark.parametrize(
    ("step", "batches", "settings"),
    [
        (4, 4, {}),
        (11, 11, {"dataloader_num_workers": 2}),
        (15, 15, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        (8, 15, {"gradient_accumulation_steps": 2}),  # 11 batches an epoch are 6 steps
    ],
    ids=["first epoch", "epoch's end", "second epoch", "accumulated"],
)
def test_resuming_sees_each_row_once_and_gives_the_same_weights(
    prepared, step, batches, settings, tmp_path
):
    saving = {"save_strategy": "steps", "save_steps": step}
    # The number of workers may change on the way.
    workers = {name: value for name, value in settings.items() if "workers" in name}
    alone = {name: value for name, value in settings.items() if name not in workers}
    whole = make_trainer(prepared, tmp_path / "whole", **saving, **alone)
    whole.train()
    resumed = make_trainer(prepared, tmp_path / "resumed", **saving, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert resumed.seen == whole.seen[batches:]
    assert torch.equal(weights(whole), weights(resumed))


def test_resuming_reads_nothing_of_what_was_trained_on(prepared, tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": 1}
    make_trainer(prepared, tmp_path, **saving).train()
    resumed = make_trainer(prepared, tmp_path, **saving)
    collated, collator = [], resumed.data_collator
    resumed.data_collator = lambda rows: collated.append(rows) or collator(rows)
    groups, read = [], RowGroup.read
    monkeypatch.setattr(RowGroup, "read", lambda group: groups.append(group) or read(group))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert len(collated) == len(resumed.seen) == 1
    assert len(groups) <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 8}, "'batch_size': 8.*with batch_size 6: some would be"),
        ({"train": 5}, "'seed': 5.*with seed 0: some would be left out"),
    ],
)
def test_rows_in_another_order_are_not_resumed(prepared, settings, message, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(prepared, tmp_path, **saving).train()
    if "train" in settings:
        stream = SequenceStream(prepared.split("train"), buffer_size=16, seed=settings["train"])
        settings = {"train": stream}
    resumed = make_trainer(prepared, tmp_path, **{**saving, "max_steps": 4}, **settings)
    with pytest.raises(ArgumentError, match=message):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not resumed.seen


def test_data_may_be_taken_from_the_start_on_resuming(prepared, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    whole = make_trainer(prepared, tmp_path, **saving)
    whole.train()
    resumed = make_trainer(prepared, tmp_path, ignore_data_skip=True, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.seen == whole.seen[: len(resumed.seen)]


def test_a_last_batch_that_is_short_may_be_dropped(prepared, tmp_path):
    trainer = make_trainer(
        prepared, tmp_path, dataloader_drop_last=True, per_device_train_batch_size=32
    )
    sizes = [len(batch["labels"]) for batch in trainer.get_train_dataloader()]
    assert sizes == [32] * (len(prepared.split("train")) // 32)


def test_a_stream_is_not_grouped_by_length(prepared, tmp_path):
    with pytest.raises(ArgumentError, match=r"train_sampling_strategy='group_by_length'"):
        make_trainer(prepared, tmp_path, train_sampling_strategy="group_by_length")


# ------------------------------------------------------------------------------- several processes


def findings(folder, world):
    """Return rows seen, weights and metrics of a whole run, and of one resumed."""
    prepared = open_prepared(Path(folder) / "prepared")
    settings = {
        "per_device_train_batch_size": 8 // world,
        "per_device_eval_batch_size": 11,
        "save_strategy": "steps",
        "save_steps": 4,
        "dataloader_num_workers": 2,
        "max_grad_norm": 0.0,
    }
    whole = make_trainer(prepared, Path(folder) / "run", **settings)
    assert whole.args.world_size == world
    whole.train()
    metrics = {n: v for n, v in whole.evaluate().items() if "@" in n or n == "eval_loss"}
    resumed = make_trainer(prepared, Path(folder) / "run", **settings)
    resumed.train(resume_from_checkpoint=str(Path(folder) / "run" / "checkpoint-4"))
    other = prepared.split("train").in_memory().to_iterable_dataset(num_shards=4)
    foreign = make_trainer(prepared, Path(folder) / "run", other, max_steps=3)
    foreign.train()
    return {
        "seen_of_another_stream": foreign.seen,
        "seen": whole.seen,
        "seen_after": resumed.seen,
        "weights": weights(whole).double().sum().item(),
        "weights_after": weights(resumed).double().sum().item(),
        "metrics": metrics,
    }


@pytest.mark.slow
def test_two_processes_share_a_stream_and_resume_it(prepared, tmp_path):
    (tmp_path / "prepared").symlink_to(prepared.path)
    first, second = findings_of_two_processes("tests.training.test_streaming", tmp_path)
    for found in (first, second):
        assert found["seen_after"] == found["seen"][4:]
        assert found["weights_after"] == found["weights"] == first["weights"]
    split = prepared.split("train")
    steps = len(first["seen"]) // 2
    assert len(first["seen"]) == len(second["seen"]) == 2 * -(-len(split) // 8)
    wanted = sorted(row["item_ids"][-21:-1].tolist() for row in split)
    both = flat(first["seen"][:steps]) + flat(second["seen"][:steps])
    assert len(both) - len(split) == len(split) % 2
    assert {tuple(row) for row in both} == {tuple(row) for row in wanted}
    assert first["metrics"] == second["metrics"]
    others = [flat(found["seen_of_another_stream"]) for found in (first, second)]
    assert all(len(seen) == 3 * 6 for seen in others)
    assert set(map(tuple, flat(others))) <= {tuple(row) for row in wanted}
    alone = make_trainer(prepared, tmp_path / "alone")
    model = RecommenderModel.from_pretrained(tmp_path / "run" / f"checkpoint-{2 * steps}")
    alone.model.load_state_dict(model.state_dict())
    metrics = alone.evaluate()
    assert first["metrics"] == pytest.approx({n: metrics[n] for n in first["metrics"]}, rel=1e-5)
