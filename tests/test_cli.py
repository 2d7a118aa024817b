"""`hf-rece` from the shell."""

import json
from dataclasses import asdict

import polars as pl
import pytest
import torch

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, cli, plan_losses
from hf_rece.data.interactions import log_facts
from hf_rece.data.synthetic import generate_interactions
from hf_rece.embeddings.digits import own_codes
from hf_rece.errors import ArgumentError, DataError
from hf_rece.losses import LOSSES
from hf_rece.serving.jobs import read_histories

QUICK = ["--num_train_epochs", "1", "--hidden_size", "8", "--max_length", "10", "--use_cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A log with columns of other names, and a model trained on it."""
    folder = tmp_path_factory.mktemp("run")
    log = generate_interactions(60, 50)
    log.rename({"user_id": "who", "item_id": "what", "timestamp": "when"}).write_csv(
        folder / "log.csv"
    )
    columns = ["--user_column", "who", "--item_column", "what", "--time_column", "when"]
    where = ["--train_file", str(folder / "log.csv"), *columns]
    cli.train([*where, *QUICK, "--output_dir", str(folder / "model"), "--loss_type", "rece"])
    return folder, where


def test_train_saves_model_tokenizer_and_metrics(trained):
    folder, _ = trained
    names = {path.name for path in (folder / "model").iterdir()}
    assert {"config.json", "model.safetensors", "items.json", "metrics.json"} <= names
    metrics = json.loads((folder / "model" / "metrics.json").read_text())
    assert set(metrics) == {"test", "most_popular"}
    assert json.loads((folder / "model" / "config.json").read_text())["loss_type"] == "rece"


@pytest.fixture(scope="module")
def trained_from_disk(tmp_path_factory):
    """A log in several files, prepared, and a model with compressed items trained on it."""
    from hf_rece.data.synthetic import generate_interactions

    folder = tmp_path_factory.mktemp("disk")
    for i, part in enumerate(generate_interactions(60, 50, seed=1).iter_slices(300)):
        part.rename({"user_id": "who"}).write_csv(folder / f"log-{i}.csv")
    words = ["--train_file", str(folder / "log-*.csv"), "--output_dir", str(folder / "prepared")]
    cli.prepare([*words, "--user_column", "who", "--n_shards", "2", "--split", "temporal",
                 "--test_quantile", "0.6"])  # fmt: skip
    table = {"type": "compositional", "compression": 2, "n_codes": 4}
    words = ["--train_file", str(folder / "prepared"), "--output_dir", str(folder / "model")]
    cli.train([*words, *QUICK, "--item_embedding", json.dumps(table), "--eval_users", "9"])
    return folder


def test_a_prepared_log_trains_and_evaluates(trained_from_disk, capsys):
    model = trained_from_disk / "model"
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "model.safetensors", "items.json", "metrics.json"} <= names
    config = json.loads((model / "config.json").read_text())
    assert config["training_run"]["data"].startswith("temporal split, users active after the 0.6")
    assert config["training_run"]["epochs"] == 1
    words = ["--train_file", str(trained_from_disk / "prepared"), "--model_name_or_path"]
    capsys.readouterr()
    cli.evaluate([*words, str(model), "--eval_users", "9"])
    found = capsys.readouterr().out
    wanted = json.loads((model / "metrics.json").read_text())["test"]["ndcg@10"]
    assert f"{wanted:.4f}" in found


def test_a_prepared_log_of_other_items_is_refused(trained_from_disk, trained):
    words = ["--train_file", str(trained_from_disk / "prepared"), "--model_name_or_path"]
    with pytest.raises(DataError, match="its items are not those of the model"):
        cli.evaluate([*words, str(trained[0] / "model")])


def test_prepare_needs_files(tmp_path):
    with pytest.raises(ArgumentError, match="train_file=None: no log"):
        cli.prepare(["--output_dir", str(tmp_path)])


def test_train_reads_an_atomic_file_of_recbole(tmp_path):
    names = {"user_id": "user_id:token", "item_id": "item_id:token", "timestamp": "timestamp:float"}
    log = generate_interactions(60, 50)
    log.rename(names).write_csv(tmp_path / "ml.inter", separator="\t")
    where = ["--train_file", str(tmp_path / "ml.inter"), "--output_dir", str(tmp_path / "run")]
    cli.train([*where, *QUICK, "--max_steps", "1"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert log_facts(log) in config["training_run"]["data"]


def test_train_keeps_the_density_that_was_asked_for(tmp_path):
    words = ["--density", "0.2", "--density_update_interval", "2", "--output_dir", str(tmp_path)]
    cli.train([*QUICK, *words, "--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no",
               "--load_best_model_at_end", "false"])  # fmt: skip
    model = RecommenderModel.from_pretrained(tmp_path)
    table = model.get_input_embeddings().weight
    assert (table != 0).sum() == round(0.2 * table.numel())


def test_evaluate_repeats_the_metrics_of_training(trained, capsys):
    folder, where = trained
    metrics = json.loads((folder / "model" / "metrics.json").read_text())["test"]
    cli.evaluate([*where, "--model_name_or_path", str(folder / "model")])
    shown = capsys.readouterr().out
    assert f"{metrics['ndcg@10']:.4f}" in shown
    assert f"{metrics['loss']:.4f}" in shown


def test_evaluate_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    folder, where = trained
    monkeypatch.chdir(tmp_path)
    cli.evaluate([*where, "--model_name_or_path", str(folder / "model")])
    assert list(tmp_path.iterdir()) == []


def test_recommend_answers_histories_given_and_from_a_file(trained, capsys):
    folder, _ = trained
    items = json.loads((folder / "model" / "items.json").read_text())
    model = ["--model_name_or_path", str(folder / "model"), "--k", "3"]
    cli.recommend([*model, "--history", *items[:2]])
    by_flag = capsys.readouterr().out
    (folder / "histories.jsonl").write_text(json.dumps(items[:2]) + "\n")
    cli.recommend([*model, "--histories_file", str(folder / "histories.jsonl")])
    assert capsys.readouterr().out == by_flag
    assert sum(item in by_flag for item in items[2:]) == 3


def test_recommend_keeps_to_lists(trained, capsys):
    folder, _ = trained
    items = json.loads((folder / "model" / "items.json").read_text())
    model = ["--model_name_or_path", str(folder / "model"), "--history", items[0]]
    cli.recommend([*model, "--allowed_items", *items[1:4], "--denied_items", items[2]])
    shown = capsys.readouterr().out
    assert [item in shown for item in items[1:4]] == [True, False, True]


def test_recommend_answers_a_file_of_users(trained, capsys):
    folder, _ = trained
    items = json.loads((folder / "model" / "items.json").read_text())
    users = pl.DataFrame({"who": [1, 2], "took": [items[:2], items[3:4]]})
    users.write_parquet(folder / "users.parquet")
    words = ["--users", str(folder / "users.parquet"), "--output", str(folder / "recs.parquet")]
    columns = ["--user_column", "who", "--history_column", "took"]
    cli.recommend(["--model_name_or_path", str(folder / "model"), "--k", "3", *words, *columns])
    assert "6 recommendations to 2 of 2 users; 0 unknown" in capsys.readouterr().out
    assert pl.read_parquet(folder / "recs.parquet")["who"].to_list() == [1, 1, 1, 2, 2, 2]


def test_recommend_searches_the_index_beside_the_model(trained, capsys):
    pytest.importorskip("faiss")
    folder, _ = trained
    items = json.loads((folder / "model" / "items.json").read_text())
    model = ["--model_name_or_path", str(folder / "model")]
    cli.index(model)
    assert "recall@10 1.000" in capsys.readouterr().out
    cli.recommend([*model, "--history", items[0]])
    exact = capsys.readouterr().out
    cli.recommend([*model, "--history", items[0], "--use_index"])
    assert capsys.readouterr().out == exact


@pytest.mark.slow
def test_export_writes_the_encoder(trained, capsys):
    folder, _ = trained
    path = folder / "encoder.pt2"
    cli.export(["--model_name_or_path", str(folder / "model"), "--output", str(path)])
    assert path.exists()


def test_users_and_output_go_together():
    with pytest.raises(ArgumentError, match="output=None: goes with users"):
        cli.RecommendArguments("model", users="u.parquet")


def test_yaml_sets_what_flags_override(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("hidden_size: 12\nloss_kwargs: {n_rounds: 3}\nloss_type: rece\n")
    types = (cli.DataArguments, cli.ModelArguments, cli.TrainDefaults)
    _, model, training = cli.parse(types, ["--config", str(path)], "train")
    assert (model.hidden_size, training.loss_kwargs) == (12, {"n_rounds": 3})
    _, model, _ = cli.parse(types, [str(path), "--hidden_size", "16"], "train")
    assert model.hidden_size == 16


def test_an_unknown_yaml_key_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("hiden_size: 12\n")
    with pytest.raises(ArgumentError, match="hiden_size"):
        cli.parse((cli.ModelArguments,), [str(path)], "train")


@pytest.mark.parametrize(
    "setting", ["loss_kwargs: true", "ranking_ks: 10", "ranking_ks: [0]", "max_length: 0"]
)
def test_a_yaml_value_of_another_type_is_named(setting, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(setting)
    with pytest.raises(ArgumentError, match=setting.partition(":")[0]):
        cli.parse((cli.TrainDefaults,), [str(path), "--output_dir", str(tmp_path)], "train")


def test_settings_that_transformers_refuses_are_refused_in_one_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--load_best_model_at_end", "--save_strategy", "no"]
    with pytest.raises(ArgumentError, match=r"settings=.*load_best_model_at_end.*train --help"):
        cli.parse((cli.TrainDefaults,), words, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", r"run\.yaml: not YAML"), ("- a\n- b\n", r"run\.yaml: not a mapping")],
)
def test_a_yaml_file_that_cannot_be_read_is_named(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        cli.parse((cli.ModelArguments,), [str(path)], "train")


def test_a_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.yaml: no such file"):
        cli.parse((cli.ModelArguments,), [str(tmp_path / "no.yaml")], "train")


def test_two_yaml_files_are_refused():
    with pytest.raises(ArgumentError, match="more than one file"):
        cli.parse((cli.ModelArguments,), ["a.yaml", "b.yaml"], "train")


@pytest.mark.parametrize(
    "line", ["not json", '"item"', '{"item": 1}', '[["item"]]', '["item", {}]', "[" * 100_000]
)
def test_a_history_that_is_no_list_is_named(line, tmp_path):
    path = tmp_path / "histories.jsonl"
    path.write_text(f'["item"]\n\n{line}\n')
    with pytest.raises(DataError, match=r"histories\.jsonl, line 3: not a JSON list"):
        read_histories(str(path))


def test_a_missing_file_of_histories_is_named():
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        read_histories("no.jsonl")


def test_histories_that_are_not_text_are_named(tmp_path):
    (tmp_path / "histories.jsonl").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"histories\.jsonl: not UTF-8"):
        read_histories(str(tmp_path / "histories.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        read_histories(str(tmp_path))


def test_items_that_are_integers_are_read_as_such(tmp_path, capsys):
    model = RecommenderModel(RecommenderConfig(backbone={"hidden_size": 8}, vocab_size=6))
    model.tokenizer = ItemTokenizer(items=[10, 20, 30, 40, 50])
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    words = ["--model_name_or_path", str(tmp_path), "--k", "4", "--history", "10"]
    cli.recommend(words)
    shown = capsys.readouterr().out
    assert all(str(item) in shown for item in (20, 30, 40, 50))
    with pytest.warns(UserWarning, match="'abc'"):
        cli.recommend([*words, "abc"])
    assert capsys.readouterr().out.count(" 20 ") == shown.count(" 20 ")


@pytest.mark.parametrize("backbone", ["gpt2", "llama", "qwen3"])
def test_any_decoder_trains_from_flags(backbone, tmp_path):
    frame = pl.DataFrame(
        {"user_id": [u for u in range(20) for _ in range(5)], "item_id": list(range(10)) * 10}
    ).with_row_index("timestamp")
    frame.write_parquet(tmp_path / "log.parquet")
    where = ["--train_file", str(tmp_path / "log.parquet"), "--output_dir", str(tmp_path / "run")]
    cli.train([*where, *QUICK, "--backbone", backbone])
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_compressed_table_trains_and_recommends_from_flags(tmp_path, capsys):
    where = ["--output_dir", str(tmp_path), *QUICK]
    table = {"type": "compositional", "compression": 2, "n_codes": 4}
    cli.train([*where, "--item_embedding", json.dumps(table), "--max_steps", "2"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["item_embedding"] == table
    model = RecommenderModel.from_pretrained(tmp_path)
    item = model.tokenizer.items[0]
    capsys.readouterr()
    cli.recommend(["--model_name_or_path", str(tmp_path), "--history", item, "--k", "2"])
    assert item in capsys.readouterr().out
    # The codes are the log's, not those that the table starts with.
    codes = model.get_input_embeddings().codes
    assert not torch.equal(codes, own_codes(len(codes), model.get_input_embeddings().radices))


def test_an_unknown_table_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"item_embedding=.*names no table"):
        cli.train(["--item_embedding", '{"type": "tensor train"}', "--output_dir", str(tmp_path)])


def test_an_unknown_backbone_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="backbone='lama'"):
        cli.train(["--backbone", "lama", "--output_dir", str(tmp_path)])


def test_two_sources_are_refused():
    with pytest.raises(ArgumentError, match="dataset_name='x/y'"):
        cli.train(["--train_file", "a.csv", "--dataset_name", "x/y"])


def test_recommend_needs_a_history(tmp_path):
    with pytest.raises(ArgumentError, match="history"):
        cli.recommend(["--model_name_or_path", str(tmp_path)])


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv: no such file"):
        cli.train(["--train_file", str(tmp_path / "no.csv"), "--output_dir", str(tmp_path)])


SHAPE = ["--classes", "100000", "--tokens", "4096", "--width", "64"]


def test_plan_shows_every_loss_beside_dense(capsys):
    cli.plan([*SHAPE, "--memory_budget", "60MiB"])
    shown = capsys.readouterr().out
    for word in ("dense", *LOSSES, "N=4,096, C=100,000, D=64", "4.58 GiB", "157 GFLOP", "n_hard="):
        assert word in shown, word


def test_plan_as_json_holds_the_rows_of_plan_losses(capsys):
    words = ["--dtype", "bfloat16", "--device", "cuda", "--losses", "rece", "gbce", "--json"]
    cli.plan([*SHAPE, *words])
    rows = json.loads(capsys.readouterr().out)
    plans = plan_losses(4096, 100_000, 64, dtype="bfloat16", device="cuda", losses=["rece", "gbce"])
    assert rows == [asdict(plan) for plan in plans]
    assert [row["loss"] for row in rows] == ["dense", "rece", "gbce"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--losses", "recee"], r"losses=\['recee'\].*rece, sce"),
        (["--dtype", "int8"], "dtype='int8'.*float32"),
        (["--device", "tpu"], "device='tpu'.*cuda"),
        (["--memory_budget", "1 MiB"], "memory_budget='1 MiB'.*at least"),
        (["--memory_budget", "much"], "memory_budget='much'.*2GiB"),
        (["--width", "0"], "width=0"),
    ],
)
def test_plan_names_what_is_wrong(words, message):
    with pytest.raises(ArgumentError, match=message):
        cli.plan([*SHAPE, *words])


def test_a_memory_budget_trains_from_yaml_and_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("memory_budget: 64MiB\nloss_type: stratified\n")
    (training,) = cli.parse((cli.TrainDefaults,), [str(path)], "train")
    assert training.loss_knobs == {"memory_budget": "64MiB"}
    words = ["--memory_budget", "100000000", "--output_dir", str(tmp_path / "run")]
    cli.train([*QUICK, *words, "--loss_type", "rece", "--max_steps", "2"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["loss_kwargs"] == {"memory_budget": "100000000"}


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 0), (["fly"], 2)])
def test_usage(words, code, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-rece", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert "usage: hf-rece COMMAND" in captured.out + captured.err


def test_errors_are_printed_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-rece", "train", "--train_file", "no.csv"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.strip().startswith("error: no.csv: no such file.")
