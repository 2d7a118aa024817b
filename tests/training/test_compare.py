"""Finished runs side by side."""

import json
import shutil
import sys

import polars as pl
import pytest
from matplotlib.image import imread
from transformers import Trainer, TrainingArguments

from hf_rece import cli
from hf_rece.errors import ArgumentError, DataError
from hf_rece.training.compare import compare_runs
from hf_rece.training.comparison_output import CompareArguments, plot_comparison, write_comparison
from hf_rece.training.reporting import TRAINING_RUN
from hf_rece.training.runs import load_run
from tests.training.test_language_model import language_model, padded, sequences, trainer_of
from tests.training.test_trainer import make_data, make_trainer

STEPS = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "logging_steps": 2}


def train_recommender(data, folder, **settings):
    trainer = make_trainer(data, folder, save_strategy="no", **STEPS, **settings)
    trainer.train()
    trainer.evaluate(data[1]["test"], metric_key_prefix="test")
    trainer.save_model()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two recommenders, a language model, and a model that any Trainer trained."""
    folder, data = tmp_path_factory.mktemp("runs"), make_data()
    train_recommender(data, folder / "exact", loss_type="cross_entropy")
    train_recommender(data, folder / "rece", loss_type="rece", loss_kwargs={"n_rounds": 3})
    language = trainer_of(language_model(), folder / "words", loss_type="sce", **STEPS)
    language.train()
    language.evaluate()
    plain = Trainer(
        language_model(),
        TrainingArguments(str(folder / "plain"), use_cpu=True, disable_tqdm=True, **STEPS,
                          save_steps=2, dataloader_pin_memory=False),
        train_dataset=sequences(32),
        eval_dataset=sequences(13, seed=1),
        data_collator=padded,
    )  # fmt: skip
    plain.train()
    return folder


@pytest.fixture
def changed(runs, tmp_path):
    """Return a function that copies a run and changes what one of its files says."""

    def change(name, copy, file, **new):
        shutil.copytree(runs / name, tmp_path / copy)
        path = tmp_path / copy / file
        content = json.loads(path.read_text())
        (content["training_run"] if file == "config.json" else content).update(new)
        path.write_text(json.dumps(content))
        return tmp_path / copy

    return change


def log_of(folder):
    return json.loads((folder / TRAINING_RUN).read_text())["log_history"]


def test_the_table_holds_what_differs_metric_and_cost(runs):
    comparison = compare_runs([runs / "exact", runs / "rece"])
    assert (comparison.metric, comparison.part) == ("ndcg@10", "test")
    assert comparison.warnings == []
    table = comparison.table
    assert table.columns == [
        "run", "loss_type", "n_rounds", "ndcg@10", "of_best", "seconds", "peak_mib"
    ]  # fmt: skip
    rows = {row["run"]: row for row in table.to_dicts()}
    assert (rows["rece"]["loss_type"], rows["rece"]["n_rounds"]) == ("rece", 3)
    assert rows["exact"]["n_rounds"] is None
    for name, row in rows.items():
        assert row["ndcg@10"] == log_of(runs / name)[-1]["test_ndcg@10"]
        assert row["seconds"] > 0
        assert row["peak_mib"] > 100
    best, second = table["ndcg@10"]
    assert best >= second
    assert table["of_best"].to_list() == [1, second / best]
    common = comparison.common
    assert (common["learning_rate"], common["hidden_size"], common["steps"]) == (0.01, 16, 4)
    assert "SHA-256" in common["evaluated_on"]


def test_a_metric_may_be_named_and_less_loss_is_better(runs):
    comparison = compare_runs(str(runs / "*e*c*"), "eval_loss")
    losses = {name: log_of(runs / name)[-1]["test_loss"] for name in ("exact", "rece")}
    assert comparison.table["loss"].to_list() == sorted(losses.values())
    assert comparison.table["of_best"].to_list()[1] > 1


def test_runs_on_other_data_do_not_compare(runs, changed):
    other = changed("rece", "other", "config.json", data="another log, SHA-256 0123456789abcdef")
    comparison = compare_runs([runs / "exact", runs / "rece", other])
    (warning,) = comparison.warnings
    assert "different data or splits, and their metrics do not compare: A = " in warning
    assert "another log, SHA-256 01234567; " in warning
    assert comparison.table["of_best"].to_list().count(1) == 2  # the best on each
    again = changed("exact", "ranked", "config.json", filter_seen=False)
    (warning,) = compare_runs([runs / "exact", again]).warnings
    assert "seen items left out" in warning
    assert "seen items ranked too" in warning


def test_a_language_model_is_compared_by_perplexity(runs):
    comparison = compare_runs([runs / "words"])
    assert (comparison.metric, comparison.part) == ("perplexity", "validation")
    assert comparison.table["perplexity"].to_list() == [
        log_of(runs / "words")[-1]["eval_perplexity"]
    ]
    assert comparison.common["loss_type"] == "sce"
    assert comparison.common["evaluated_on"].startswith("13 held-out rows, SHA-256 ")


def test_a_folder_of_any_trainer_is_a_run(runs):
    run = load_run(runs / "plain")
    history = json.loads((runs / "plain" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = {log["step"]: log["eval_loss"] for log in history["log_history"] if "eval_loss" in log}
    assert {step: metrics["loss"] for step, metrics in run.curve} == losses
    assert run.metrics["validation"]["loss"] == losses[4]
    assert (run.settings["steps"], run.seconds, run.evaluated_on) == (4, None, None)
    assert load_run(runs / "plain" / "checkpoint-2").metrics["validation"]["loss"] == losses[2]
    comparison = compare_runs([runs / "plain", runs / "words"])
    assert comparison.metric == "loss"
    (warning,) = comparison.warnings
    assert warning.startswith("what plain was evaluated on is not recorded")


def test_what_trainer_saves_of_its_metrics_counts(runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    results = {"eval_loss": 1.5, "perplexity": 4.48, "train_runtime": 9.0, "eval_runtime": 1.0}
    (tmp_path / "run" / "all_results.json").write_text(json.dumps(results))
    run = load_run(tmp_path / "run")
    assert run.metrics["validation"] == {"loss": 1.5, "perplexity": 4.48}
    assert run.seconds == 9


def test_without_a_last_evaluation_the_best_checkpoint_counts(runs, changed):
    log = [entry for entry in log_of(runs / "words") if "train_loss" not in entry][:-1]
    values = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert len(values) == 2
    for best, value in values.items():
        facts = {"log_history": log, "best_global_step": best}
        run = load_run(changed("words", f"best {best}", TRAINING_RUN, **facts))
        assert run.metrics["validation"]["loss"] == value


def test_a_run_without_the_metric_comes_last(runs):
    comparison = compare_runs([runs / "words", runs / "rece", runs / "exact"])
    assert comparison.metric == "loss"
    comparison = compare_runs([runs / "words", runs / "rece", runs / "exact"], "hr@5")
    assert comparison.table["run"].to_list()[-1] == "words"
    assert comparison.table["of_best"].to_list()[-1] is None
    assert "words has no hr@5 of test" in comparison.warnings


def test_a_run_that_diverged_is_not_the_best(runs, changed, tmp_path):
    log = [{**log_of(runs / "words")[-1], "eval_perplexity": float("nan")}]
    broken = changed("words", "broken", TRAINING_RUN, log_history=log)
    comparison = compare_runs([broken, runs / "words"])
    assert comparison.table["run"].to_list() == ["words", "broken"]
    assert comparison.table["of_best"][0] == 1
    write_comparison(comparison, tmp_path / "comparison.png")


def test_names_are_as_short_as_tells_runs_apart(runs, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "rece", tmp_path / name / "model")
    names = compare_runs([tmp_path / "one" / "model", f"{tmp_path}/*/model"]).table["run"]
    assert sorted(names) == ["one/model", "two/model"]


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([], ArgumentError, r"runs=\[\]: there are none"),
        ("no/such/folder", DataError, "no/such/folder: no such folder"),
        ("*/nothing", DataError, r"\*/nothing: no folder matches"),
        ("empty", DataError, "empty: it holds no record of a run.*Pass the output_dir"),
        ("damaged", DataError, r"training_run\.json: not a JSON object"),
        ("a_file", DataError, "a_file: no such folder"),
    ],
)
def test_what_is_no_run_is_named(sources, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / TRAINING_RUN).write_text('{"log_history": [')
    (tmp_path / "a_file").write_text("")
    with pytest.raises(error, match=message):
        compare_runs(sources)


def test_an_unknown_metric_lists_those_there_are(runs):
    with pytest.raises(ArgumentError, match=r"metric='map@10': no run has it.*mrr@10, .*ndcg@10"):
        compare_runs([runs / "rece"], "map@10")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_repository_on_the_hub_is_a_run(runs, hub):
    from hf_rece import RecommenderModel

    RecommenderModel.from_pretrained(runs / "rece").push_to_hub("user/shop")
    comparison = compare_runs([runs / "rece", "user/shop"])
    assert comparison.table["ndcg@10"].n_unique() == 1
    assert set(comparison.table["run"]) == {"rece", "shop"}
    assert comparison.warnings == []
    with pytest.raises(DataError, match="user/nothing: neither a folder nor a repository"):
        compare_runs("user/nothing")


def test_a_plot_draws_each_curve_and_each_model(runs, tmp_path):
    comparison = compare_runs([runs / "exact", runs / "rece"])
    curves, cost = plot_comparison(comparison).axes
    for line, run in zip(curves.lines, comparison.runs, strict=True):
        logged = [
            (e["step"], e["eval_ndcg@10"]) for e in log_of(runs / run.name) if "eval_loss" in e
        ]
        assert list(zip(*line.get_data(), strict=True)) == logged
        assert line.get_label() == run.name
    points = [points.get_offsets()[0].tolist() for points in cost.collections]
    assert points == [list(row) for row in comparison.table.select("peak_mib", "ndcg@10").rows()]
    write_comparison(comparison, tmp_path / "comparison.png")
    assert imread(tmp_path / "comparison.png").std() > 0.05


def test_a_plot_says_what_is_not_recorded(runs):
    _, cost = plot_comparison(compare_runs([runs / "plain"])).axes
    assert [text.get_text() for text in cost.texts] == ["not recorded"]


def test_data_of_a_comparison_are_written(runs, tmp_path):
    comparison = compare_runs([runs / "exact", runs / "rece"])
    write_comparison(comparison, tmp_path / "comparison.csv")
    assert pl.read_csv(tmp_path / "comparison.csv").rows() == comparison.table.rows()
    write_comparison(comparison, tmp_path / "comparison.json")
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["runs"] == comparison.table.to_dicts()
    assert [step for step, _ in written["validation_curves"]["rece"]] == [2, 4]


@pytest.mark.parametrize(
    ("output", "message"),
    [("plot.jpg", "unknown ending. Pass one of .png"), ("no/plot.png", "its folder is not there")],
)
def test_an_output_that_cannot_be_is_named_first(output, message):
    with pytest.raises(ArgumentError, match=message):
        CompareArguments(output=output)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"matplotlib is not installed.*hf_rece\[plot\]"):
        CompareArguments(output="plot.png")


def test_the_command_prints_and_writes(runs, tmp_path, capsys, changed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    other = changed("rece", "other", "config.json", data="another log")
    output = tmp_path / "runs.csv"
    cli.compare([str(runs / "exact"), str(runs / "rece"), str(other), "--output", str(output)])
    shown = capsys.readouterr().out
    for word in ("exact", "rece", "other", "n_rounds=3", "learning_rate=0.01", "ndcg@10 of test"):
        assert word in shown, word
    assert "Warning: the runs were evaluated on different data" in shown
    assert output.exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"training_run": "x"}),
        ("config.json", {"training_run": {"metrics": {"test": [1]}}}),
        ("config.json", {"training_run": {"metrics": {"test": {"ndcg@10": "x"}}}}),
        ("config.json", {"backbone": 3}),
        (TRAINING_RUN, {"log_history": [1]}),
        (TRAINING_RUN, {"log_history": "abc"}),
        (TRAINING_RUN, {"log_history": [{"step": None, "eval_loss": 1.0}]}),
        (TRAINING_RUN, {"loss_kwargs": "x"}),
        (TRAINING_RUN, {"arguments": 1}),
    ],
)
def test_a_damaged_record_is_named(file, change, runs, tmp_path):
    shutil.copytree(runs / "exact", tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match="run: its record of a run is damaged"):
        compare_runs(tmp_path / "run")
