"""Records of runs, prepared logs, histories and what killed processes left: used, or refused."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.prepared import open_prepared
from hf_rece.errors import HfReceError
from hf_rece.files import finish_files
from hf_rece.models.recommendation import known_histories
from hf_rece.serving.jobs import read_histories
from hf_rece.training.compare import compare_runs
from hf_rece.training.comparison_output import show_comparison, write_comparison
from tests.fuzz.cases import cases
from tests.fuzz.damage import changed, damaged, huge, plain

# ---------------------------------------------------------------------------------- records of runs

METRICS = {"ndcg@10": 0.1, "loss": 2.5}
RUN = {
    "config.json": {
        "model_type": "hf_rece_recommender", "vocab_size": 12, "loss_type": "rece",
        "loss_kwargs": {"n_rounds": 2}, "backbone": {"model_type": "hf_rece_sasrec"},
        "training_run": {
            "data": "a log of 3 users, SHA-256 abc", "filter_seen": True, "seconds": 2.0,
            "peak_mib": 300, "steps": 4, "metrics": {"test": METRICS, "validation": METRICS},
        },
    },
    "training_run.json": {
        "arguments": {"learning_rate": 0.1}, "loss_type": "rece", "evaluated_on": "a log",
        "log_history": [
            {"step": 2, "eval_loss": 3.0, "eval_ndcg@10": 0.05},
            {"step": 4, "train_loss": 2.0, "train_runtime": 2.5},
            {"step": 4, "test_ndcg@10": 0.1, "peak_mib": 200},
        ],
    },
    "all_results.json": {"perplexity": 3.0, "eval_runtime": 1.0},
}  # fmt: skip


@st.composite
def records(draw):
    """The files of a run, one of them changed."""
    files = {name: json.dumps(content).encode() for name, content in RUN.items()}
    name = draw(st.sampled_from(list(RUN)))
    how = draw(st.sampled_from(["changed", "settings", "cut"]))
    if how == "changed":
        files[name] = json.dumps(draw(changed(RUN[name], plain | huge))).encode()
    elif how == "cut":
        files[name] = files[name][: draw(st.integers(0, len(files[name])))]
    else:
        choose = draw(st.randoms(use_true_random=False))
        files[name] = damaged(files[name], (how, choose, draw(plain | huge)))
    return files


@cases(40, records())
def test_a_record_is_compared_or_refused(case):
    with tempfile.TemporaryDirectory() as name:
        for run, files in (("calm", RUN), ("damaged", case)):
            (Path(name) / run).mkdir()
            for file, content in files.items():
                whole = content if isinstance(content, bytes) else json.dumps(content).encode()
                (Path(name) / run / file).write_bytes(whole)
        try:
            comparison = compare_runs([f"{name}/calm", f"{name}/damaged"])
        except HfReceError:
            return
        with contextlib.redirect_stdout(io.StringIO()):
            show_comparison(comparison)
        for output in ("table.csv", "table.json"):
            write_comparison(comparison, f"{name}/{output}")


# ------------------------------------------------------------------------------------ prepared logs


def test_a_damaged_prepared_log_is_read_or_refused(prepared):
    rows = {name: len(prepared.split(name)) for name in ("train", "validation", "test")}
    texts = {
        name: (prepared.path / name).read_bytes()
        for name in ("prepared.json", "items.json", "tokenizer_config.json")
    }
    manifest = json.loads(texts["prepared.json"])
    cut = st.tuples(st.just("cut"), st.floats(0, 0.999), st.just(b""))
    replaced = st.tuples(
        st.just("settings"), st.randoms(use_true_random=False), plain | huge | st.just("../x")
    )
    damages = st.tuples(st.sampled_from(list(texts)), cut | replaced)
    damages |= st.tuples(st.just("prepared.json"), changed(manifest, plain | huge))

    @cases(40, damages)
    def test_damaged_prepared_logs(case):
        file, damage = case
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(prepared.path, folder, dirs_exist_ok=True)
            whole = damage if isinstance(damage, dict) else None
            path = Path(folder) / file
            path.write_bytes(json.dumps(whole).encode() if whole else damaged(texts[file], damage))
            with contextlib.suppress(HfReceError):
                opened = open_prepared(folder)
                assert len(opened.tokenizer.items) >= 0
                for name, n_rows in rows.items():
                    found = list(opened.split(name))
                    assert len(found) <= n_rows
                opened.check()

    test_damaged_prepared_logs()


# ---------------------------------------------------------------------------------------- histories

lines = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@cases(40, st.lists(lines.map(lambda line: json.dumps(line).encode()) | st.binary(max_size=6)))
def test_histories_are_read_or_refused(case):
    tokenizer = ItemTokenizer(items=["a", "b"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "histories.jsonl"
        path.write_bytes(b"\n".join(case))
        try:
            histories = read_histories(str(path))
            known = known_histories(tokenizer, histories)
        except (HfReceError, UserWarning):  # of items that are not known
            return
    assert len(known) == len(histories)


# ----------------------------------------------------------------------- what killed processes left

names = st.sampled_from(
    ["config", "a", "deep/b", "link/c", "../outside", "/outside", "..", ".", "", "deep", "config/x"]
)


@cases(60, st.tuples(st.lists(names | lines, max_size=4) | lines, st.sets(names, max_size=4)))
def test_what_was_left_moves_nothing_elsewhere(case):
    listed, there = case
    with tempfile.TemporaryDirectory() as name:
        folder, elsewhere = Path(name) / "model", Path(name) / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "c").write_text("theirs")
        done = folder / "_finished-config"
        done.mkdir(parents=True)
        (folder / "link").symlink_to(elsewhere)
        (folder / "outside").write_text("here")
        for each in there - {"..", ".", "", "/outside", "deep", "config/x"}:
            (done / each).parent.mkdir(exist_ok=True)
            (done / each).write_text("new")
        (done / "_names.json").write_text(json.dumps(listed))
        with contextlib.suppress(HfReceError):
            finish_files(folder, "config", replaced=("*",))
        assert sorted(path.name for path in Path(name).iterdir()) == ["elsewhere", "model"]
        assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"c": "theirs"}
