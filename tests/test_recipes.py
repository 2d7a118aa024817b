"""Recipes run as their heads say, and benchmarks read what they wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_rece import cli, generate_interactions
from hf_rece.data.prepare import prepare_log
from hf_rece.data.prepared import open_prepared

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SCRIPTS = sorted(path for path in RECIPES.rglob("*.py") if path.stem != "environment")


def run(script, *words, cwd=None):
    done = subprocess.run(
        [sys.executable, str(RECIPES / script), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if "__main__" in path.read_text()], ids=lambda path: path.name
)
def test_a_recipe_begins_with_its_command(path):
    head = path.read_text().split('"""')[1]
    assert f"python {path.relative_to(RECIPES.parent)}" in head or f"python {path.name}" in head


def finetune_types():
    pytest.importorskip("trl")
    from trl.trainer.model_config import ModelConfig

    from hf_rece.training.finetune import FinetuneDataArguments, FinetuneDefaults

    return FinetuneDataArguments, ModelConfig, FinetuneDefaults


COMMANDS = {
    "sequential_recommendation": (
        "train",
        lambda: (cli.DataArguments, cli.ModelArguments, cli.TrainDefaults),
    ),
    "language_model": ("finetune", finetune_types),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "path",
    sorted(path for folder in COMMANDS for path in (RECIPES / folder).glob("*.yaml")),
    ids=lambda path: path.name,
)
def test_every_yaml_file_parses(path, tmp_path):
    settings = yaml.safe_load(path.read_text())
    command, types = COMMANDS[path.parent.name]
    words = [str(path), "--output_dir", str(tmp_path), "--bf16", "false"]
    *_, training = cli.parse(types(), words, command)
    assert training.loss_type == settings["loss_type"]


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")]
)
def test_accelerate_takes_every_configuration(name, kind):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == (kind, 2)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 3


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_language_model_recipes_list_their_flags(script):
    pytest.importorskip("trl")
    assert "--loss_type" in run(f"language_model/{script}.py", "--help")


def test_the_training_recipe_ends_with_tables(tmp_path):
    words = ["--num_train_epochs", "1", "--hidden_size", "8", "--output_dir", str(tmp_path)]
    output = run("sequential_recommendation/train.py", *words, "--max_steps", "3")
    assert "most popular" in output
    assert "Recommendations to test users" in output
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_a_newcomers_path_ends_with_the_same_recommendations(hub, tmp_path):
    log = generate_interactions(120, 60)
    log.rename({"user_id": "customer", "item_id": "product", "timestamp": "bought_at"}).write_csv(
        tmp_path / "log.csv"
    )
    columns = ["--user_column", "customer", "--item_column", "product", "--time_column"]
    words = ["--train_file", "log.csv", *columns, "bought_at", "--hub_model_id", "user/shop"]
    small = ["--num_train_epochs", "2", "--hidden_size", "8", "--max_length", "10", "--use_cpu"]
    output = run("sequential_recommendation/share.py", *words, *small, cwd=tmp_path)
    assert "identical items and scores" in output
    files = hub.repositories["user/shop"].files()
    assert {"README.md", "config.json", "items.json", "metrics.json"} <= set(files)
    card = files["README.md"].decode()
    assert "120 users" in card
    assert str(tmp_path) not in card


def test_the_losses_benchmark_measures_one_loss():
    shape = ["--tokens", "256", "--classes", "2000", "--width", "8", "--repeats", "1"]
    row = json.loads(run("benchmarks/losses.py", *shape, "--only", "rece"))
    assert row["seconds"] > 0
    assert row["extra_peak_mib"] >= 0
    assert row["loss"] > 0


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script for a GPU, on a machine that seems to have one; commands do nothing."""
    monkeypatch.syspath_prepend(RECIPES / "benchmarks")
    import gpu

    class Done:
        returncode, stdout = 0, "4 passed"

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "NEEDED", ())
    monkeypatch.setattr(gpu, "environment", lambda device: {"device": device})
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: Done())
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    return gpu


def test_a_gpu_whose_results_are_missing_is_no_success(gpu, tmp_path):
    gpu.path_of(gpu.RECOMMENDER).write_text("left of another time")
    with pytest.raises(SystemExit, match="was not measured"):
        gpu.main()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["tests"] == "4 passed"
    assert {one["not_run"] for one in record["must"]} == {"no results"}


def test_what_must_hold_on_a_gpu_is_told_by_quotients(gpu):
    row = {"extra_peak_mib": 100.0, "seconds": 1.0}
    rows = {"cce_exact": row, "cross_entropy": row, "stratified": {**row, "seconds": 0.1}}
    for shape in (gpu.RECOMMENDER, gpu.LANGUAGE_MODEL):
        losses = {**rows, "rece": {"not_run": "ended by signal 9"}}
        gpu.path_of(shape).write_text(json.dumps({"losses": losses}))
    found = gpu.verdicts()
    assert [one.get("holds") for one in found] == [True, True, True, None, True, True, True, True]
    assert found[2]["quotient"] == 0.1


def test_a_peer_that_cannot_run_is_shown_with_its_reason(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES / "benchmarks")
    from contenders import CONTENDERS, Shape, reason_not_to_run

    shape = Shape(4096, 100_000, 64)
    reasons = {name: reason_not_to_run(name, shape, 1e11, 60) for name in CONTENDERS}
    assert reasons["rece"] is None
    for peer in ("liger", "cce", "cce_exact"):
        assert reasons[peer] == "needs CUDA" or reasons[peer].startswith("not installed: pip")
    huge = Shape(100_000, 10_000_000, 64)
    assert reason_not_to_run("dense", huge, 1e11, 60).startswith("would need")
    assert reason_not_to_run("cross_entropy", huge, 1e11, 60).startswith("would take")


WRONG = "@cases(5, st.integers(0))\ndef test_wrong"
PROPERTIES = """
from hypothesis import strategies as st
from tests.fuzz.cases import cases

@cases(5, st.integers(0))
def test_right(case):
    assert case >= 0

@cases(5, st.integers(0))
def test_wrong(case):
    assert case < 0
"""


@pytest.mark.parametrize("outcome", ["fails", "ends early", "holds"])
def test_fuzzing_fails_with_a_property(outcome, monkeypatch, tmp_path):
    text = PROPERTIES if outcome == "fails" else PROPERTIES.partition(WRONG)[0]
    if outcome == "ends early":
        text = text.replace("st.integers(0)", "st.booleans()")
    (tmp_path / "test_it.py").write_text(text)
    monkeypatch.syspath_prepend(RECIPES / "benchmarks")
    import fuzz

    monkeypatch.setattr(fuzz, "FOLDER", tmp_path)
    monkeypatch.setattr(fuzz, "environment", lambda: {"commit": "0123"})
    monkeypatch.setattr(fuzz, "RESULT", tmp_path / "fuzz.json")
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "7"])
    if outcome == "holds":
        fuzz.main()
    else:
        name = "test_wrong: failed" if outcome == "fails" else "test_right: 2 cases of 7"
        with pytest.raises(SystemExit, match=rf"test_it.py: {name}"):
            fuzz.main()
    found = json.loads((tmp_path / "fuzz.json").read_text())["files"]["it"]
    assert found["commit"] == "0123"
    assert found["properties"]["test_right"]["outcome"] == "passed"


def test_results_hold_no_path():
    for path in (RECIPES / "benchmarks" / "results").iterdir():
        if path.suffix.startswith(".json"):
            assert "/" not in path.read_text().replace("N/A", "")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_spark_writes_the_files_of_prepare_log(split, tmp_path):
    pytest.importorskip("pyspark")
    (tmp_path / "log").mkdir()
    log = generate_interactions(200, 60).sort("timestamp", maintain_order=True)
    for i, part in enumerate(log.iter_slices(600)):
        part.write_parquet(tmp_path / "log" / f"{i}.parquet")
    source = str(tmp_path / "log" / "*.parquet")
    settings = {"min_user_interactions": 4, "min_item_interactions": 6, "n_shards": 3}
    prepare_log(source, tmp_path / "ours", split=split, **settings)
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words += ["--train_file", source, "--output_dir", str(tmp_path / "sparks"), "--split", split]
    left = tmp_path / "sparks" / "data" / "train-00000-of-00009.parquet"  # of a run that was killed
    left.parent.mkdir(parents=True)
    (tmp_path / "sparks" / "unfinished").mkdir()
    left.write_text("half")
    run("sequential_recommendation/prepare_spark.py", *words)
    open_prepared(tmp_path / "sparks").check()
    assert not left.exists()
    assert "/" not in json.dumps(open_prepared(tmp_path / "sparks").manifest["asked_for"])
    for path in (tmp_path / "ours").rglob("*"):
        if path.is_file() and path.name != "prepared.json":
            same = tmp_path / "sparks" / path.relative_to(tmp_path / "ours")
            assert path.read_bytes() == same.read_bytes()
    manifests = [open_prepared(tmp_path / name).manifest for name in ("ours", "sparks")]
    assert {**manifests[0], "asked_for": 0} == {**manifests[1], "asked_for": 0}


@pytest.mark.slow
def test_spark_refuses_missing_values(tmp_path):
    pytest.importorskip("pyspark")
    log = generate_interactions(20, 10)
    log[3, "item_id"] = None
    log.write_parquet(tmp_path / "log.parquet")
    words = ["--train_file", str(tmp_path / "log.parquet"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(RECIPES / "sequential_recommendation/prepare_spark.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "the log, column 'item_id': 1 of" in done.stderr
