"""Training a recommender whose vocabulary is cut over processes equals training a whole one."""

from types import SimpleNamespace

import pytest
import torch

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.data.synthetic import generate_interactions
from hf_rece.errors import ArgumentError, NonfiniteError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.sparsity import DynamicSparsityCallback
from hf_rece.training.trainer import RecommenderTrainer
from hf_rece.training.vocab_parallel import clip_cut_gradients, cut_as_asked
from tests.processes import in_processes
from tests.training.test_finite_steps import break_batches

LOSSES = ("cross_entropy", "rece", "stratified")


def make_data():
    log = generate_interactions(70, 60, seed=0)
    tokenizer = ItemTokenizer.from_interactions(log)
    return tokenizer, leave_one_out_split(log, tokenizer)


def make_trainer(data, folder, world_size, **arguments):
    tokenizer, splits = data
    torch.manual_seed(0)
    backbone = SASRecConfig(
        hidden_size=16, num_hidden_layers=1, max_position_embeddings=20, dropout=0.0
    )
    shape = {name: arguments.pop(name) for name in ("output_bias", "tie_word_embeddings")
             if name in arguments}  # fmt: skip
    config = RecommenderConfig(backbone=backbone, vocab_size=len(tokenizer), **shape)
    model = RecommenderModel(config)
    model.tokenizer = tokenizer
    settings = {
        "output_dir": str(folder), "max_length": 20, "ranking_ks": [5, 10],
        "per_device_train_batch_size": 16 // world_size, "per_device_eval_batch_size": 11,
        "max_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 0.5, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "use_cpu": True, "disable_tqdm": True,
        "report_to": "none", "logging_steps": 1, "vocab_parallel": world_size > 1, **arguments,
    }  # fmt: skip
    args = RecommenderTrainingArguments(**settings)
    assert args.world_size == world_size
    return RecommenderTrainer(
        model, args, train_dataset=splits["train"], eval_dataset=splits["validation"]
    )


def run(rank, folder, world_size):
    data, found = make_data(), {}
    for loss_type in LOSSES:
        trainer = make_trainer(data, folder / loss_type, world_size, loss_type=loss_type)
        trainer.train()
        predicted = trainer.predict(data[1]["test"])
        found[loss_type] = {
            "history": [
                (e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e
            ],
            "metrics": {n: v for n, v in trainer.evaluate().items() if "@" in n or "loss" in n},
            "greater": predicted.predictions[0].tolist(),
            "answers": trainer.model.recommend([data[0].items[:3], data[0].items[5:9]], k=7),
        }
    return found


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    return run(0, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def of_processes(request, tmp_path_factory):
    return in_processes(run, request.param, tmp_path_factory.mktemp("some"), request.param)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_norm_are_those_of_one_process(of_processes, of_one, loss_type):
    wanted = of_one[loss_type]["history"]
    assert len(wanted) == 3
    for got, want in zip(of_processes[0][loss_type]["history"], wanted, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_ranks_metrics_and_answers_are_those_of_one_process(of_processes, of_one, loss_type):
    wanted = of_one[loss_type]
    for found in of_processes:
        got = found[loss_type]
        assert got["greater"] == wanted["greater"]
        assert got["metrics"]["eval_ndcg@10"] == wanted["metrics"]["eval_ndcg@10"]
        assert got["metrics"] == pytest.approx(wanted["metrics"], rel=1e-5)
        for answer, want in zip(got["answers"], wanted["answers"], strict=True):
            assert [r.item for r in answer] == [r.item for r in want]


# -------------------------------------------------------------- groups, half batches, skipped steps

# The exact loss, by a plan that is drawn.
EXACT = {"loss_type": "stratified", "loss_kwargs": {"n_hard": 300, "n_groups": 3}}
IN_GROUPS = {**EXACT, "save_strategy": "steps", "save_steps": 2}


def train_in_groups(rank, folder, world_size, checkpoint):
    """Train in two groups of two processes, with half a batch at once, skip a step, and resume."""
    data, found = make_data(), {}
    size = {"vocab_parallel_size": 2} if world_size == 4 else {}
    half = {"per_device_train_batch_size": 8 // world_size, "gradient_accumulation_steps": 2}
    for name, more in (("whole", {}), ("half", half)):
        trainer = make_trainer(data, folder / name, world_size, **IN_GROUPS, **size, **more)
        shards = trainer.vocab_shards
        assert (
            shards is None if world_size == 1 else (shards.world_size, shards.data_size) == (2, 2)
        )
        trainer.train()
        found[name] = {
            "history": [
                (e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e
            ],
            "metrics": {n: v for n, v in trainer.evaluate().items() if "@" in n or "loss" in n},
            "greater": trainer.predict(data[1]["test"]).predictions[0].tolist(),
            "answers": answers_of(trainer.model, data),
        }
    resumed = make_trainer(data, folder / "resumed", world_size, **IN_GROUPS, **size)
    resumed.train(resume_from_checkpoint=str(checkpoint or folder / "whole" / "checkpoint-2"))
    found["resumed"] = answers_of(resumed.model, data)
    skipping = make_trainer(
        data, folder / "skip", world_size, **EXACT, **size, **half, nonfinite_loss="skip"
    )
    # The first process's third micro-batch, of the second step.
    break_batches(skipping, {3} if rank == 0 else set()).train()
    found["skipped"] = skipping.skipped_steps, answers_of(skipping.model, data)
    return found


@pytest.fixture(scope="module")
def in_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, train_in_groups(0, folder, 1, None)


@pytest.fixture(scope="module")
def in_groups(in_one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    checkpoint = in_one[0] / "whole" / "checkpoint-2"
    return folder, in_processes(train_in_groups, 4, folder, 4, checkpoint)


@pytest.mark.parametrize("name", ["whole", "half"])
def test_groups_train_like_one_process(in_groups, in_one, name):
    wanted = in_one[1][name]
    for found in in_groups[1]:
        got = found[name]
        assert got["greater"] == wanted["greater"]
        assert got["metrics"]["eval_ndcg@10"] == wanted["metrics"]["eval_ndcg@10"]
        assert got["metrics"] == pytest.approx(wanted["metrics"], rel=1e-5)
        assert_same(got["answers"], wanted["answers"])
    for got, want in zip(in_groups[1][0][name]["history"], wanted["history"], strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_groups_resume_from_a_checkpoint_of_one_process(in_groups, in_one):
    for found in in_groups[1]:
        assert_same(found["resumed"], in_one[1]["whole"]["answers"])


def test_one_process_resumes_from_a_checkpoint_of_groups(in_groups, in_one, tmp_path):
    resumed = make_trainer(make_data(), tmp_path, 1, **IN_GROUPS)
    resumed.train(resume_from_checkpoint=str(in_groups[0] / "whole" / "checkpoint-2"))
    assert_same(answers_of(resumed.model, make_data()), in_one[1]["whole"]["answers"])


def test_a_step_that_is_not_finite_in_one_group_is_skipped_by_all(in_groups, in_one):
    skipped, answers = in_one[1]["skipped"]
    assert skipped == 1
    for found in in_groups[1]:
        assert found["skipped"][0] == 1
        assert_same(found["skipped"][1], answers)


# ------------------------------------------------------------------------------------- checkpoints

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "loss_type": "stratified"}
HISTORIES = (slice(0, 3), slice(5, 9))


def train_and_save(rank, folder, world_size, checkpoint=None, shape=None):
    """Return the answers after training from the checkpoint on."""
    data = make_data()
    trainer = make_trainer(data, folder, world_size, **SETTINGS, **(shape or {}))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(folder / "final")
    return answers_of(trainer.model, data)


def load_cut(rank, folder):
    model = RecommenderModel.from_pretrained(folder, vocab_parallel=True)
    assert model.item_head.weight.shape[0] < model.config.vocab_size
    return answers_of(model, make_data())


def answers_of(model, data):
    answers = model.recommend([data[0].items[part] for part in HISTORIES], k=7)
    return [[(found.item, found.score) for found in answer] for answer in answers]


def assert_same(got, wanted):
    for answer, want in zip(got, wanted, strict=True):
        assert [item for item, _ in answer] == [item for item, _ in want]
        assert [score for _, score in answer] == pytest.approx([score for _, score in want])


@pytest.fixture(scope="module", params=["tied", "apart, with bias"])
def saved(request, tmp_path_factory):
    """Return a shape, the folder of a run of four processes, and what it answers."""
    shape = {}
    if request.param != "tied":
        shape = {"output_bias": True, "tie_word_embeddings": False}
    folder = tmp_path_factory.mktemp("saved")
    of_all = in_processes(train_and_save, 4, folder, 4, None, shape)
    assert all(found == of_all[0] for found in of_all)
    return shape, folder, of_all[0]


@pytest.mark.slow
def test_one_process_loads_what_four_saved(saved):
    _, folder, answers = saved
    files = {path.name for path in (folder / "final").iterdir()}
    assert {"config.json", "items.json", "model.safetensors", "README.md"} <= files
    assert not [name for name in files if name.endswith(".part") or name.startswith("tmp")]
    model, info = RecommenderModel.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(info.values())
    assert_same(answers_of(model, make_data()), answers)


@pytest.mark.slow
def test_two_processes_load_what_four_saved(saved):
    _, folder, answers = saved
    for found in in_processes(load_cut, 2, folder / "final"):
        assert_same(found, answers)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_of_four_processes_resumes_on_fewer(saved, world_size, tmp_path):
    shape, folder, answers = saved
    arguments = (tmp_path, world_size, folder / "checkpoint-2", shape)
    if world_size == 1:
        assert_same(train_and_save(0, *arguments), answers)
    else:
        for found in in_processes(train_and_save, world_size, *arguments):
            assert_same(found, answers)


@pytest.mark.slow
def test_an_ordinary_checkpoint_resumes_on_two_processes(saved, tmp_path):
    shape, _, answers = saved
    train_and_save(0, tmp_path, 1, None, shape)
    arguments = (tmp_path / "resumed", 2, tmp_path / "checkpoint-2", shape)
    for found in in_processes(train_and_save, 2, *arguments):
        assert_same(found, answers)


# --------------------------------------------------------------------------------------- the parts


def test_clipping_does_what_torch_does():
    parameters = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(3, 4)
    wanted = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for copy, parameter in zip(wanted, parameters, strict=True):
        copy.grad = parameter.grad.clone()
    norm = clip_cut_gradients(parameters[:1], parameters[1:], None, 0.7)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(wanted, 0.7))
    for copy, parameter in zip(wanted, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, copy.grad)


def test_frozen_rows_are_no_part_of_the_norm():
    whole, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(5))
    whole.grad = torch.tensor([3.0, 4.0, 0.0])
    assert clip_cut_gradients([whole], [frozen.requires_grad_(False)], None, 1.0) == 5
    assert whole.grad.norm() == pytest.approx(1.0)
    assert clip_cut_gradients([], [frozen], None, 1.0) == 0


def refused(rank, folder):
    data, found = make_data(), {}
    for name, value in (("fsdp", "full_shard"), ("fp16", True), ("optim", "adafactor")):
        model = make_trainer(data, folder, 2, max_steps=1).model
        arguments = SimpleNamespace(**{"vocab_parallel": True, name: value})
        with pytest.raises(ArgumentError) as caught:
            cut_as_asked(model, arguments)
        found[name] = str(caught.value)
    with pytest.raises(ArgumentError) as caught:
        cut_as_asked(torch.nn.Linear(2, 2), SimpleNamespace(vocab_parallel=True))
    found["Linear"] = str(caught.value)
    trainer = make_trainer(data, folder, 2, max_steps=1)
    trainer.train()
    table = trainer.model.get_input_embeddings().weight
    found["rows"] = trainer.optimizer.state[table]["exp_avg"].shape[0]
    found["wrapper"] = type(trainer.model_wrapped).__name__
    found["backbone"] = float(trainer.model.backbone.norm.weight.double().sum())
    if rank == 1:
        table.data[0] = torch.nan
    with pytest.raises(NonfiniteError) as caught:
        trainer.train()
    found["not finite"] = str(caught.value)
    callback = DynamicSparsityCallback(0.5)
    with pytest.raises(ArgumentError) as caught:
        callback.on_init_end(trainer.args, None, None, model=trainer.model)
    found["sparsity"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return in_processes(refused, 2, tmp_path_factory.mktemp("refused"))


def test_ddp_trains_the_rest_and_the_optimizer_has_own_rows(of_two):
    first, second = of_two
    assert first["wrapper"] == second["wrapper"] == "DistributedDataParallel"
    assert first["backbone"] == second["backbone"]
    assert first["rows"] + second["rows"] == len(make_data()[0])


def test_whoever_holds_weights_that_are_not_finite_names_them(of_two):
    first, second = (found["not finite"] for found in of_two)
    assert "step 1: weights that other processes hold are not finite" in first
    assert "embed_tokens.weight are not finite" in second


@pytest.mark.parametrize("name", ["fsdp", "fp16", "optim", "Linear", "sparsity"])
def test_what_does_not_go_together_is_refused(of_two, name):
    for found in of_two:
        assert ("cut" in found[name]) or ("whole weights" in found[name])
        assert name in found[name] or name == "sparsity"
