"""What a repository, a file or a log may not do."""

import ast
import json
import logging
import pickle
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaConfig

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig, cli
from hf_rece.errors import ArgumentError, DataError, HfReceError, HubError
from hf_rece.serving.item_index import INDEX_FILE, SETTINGS_FILE, ItemIndex
from hf_rece.training.args import RecommenderTrainingArguments
from tests.training.test_trainer import make_data, make_trainer

PACKAGE = Path(__file__).resolve().parents[1] / "hf_rece"
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz12345678"
ITEMS = [f"item {i}" for i in range(29)]
CONFIG = RecommenderConfig(
    backbone=SASRecConfig(hidden_size=8, max_position_embeddings=10), vocab_size=30
)

data = pytest.fixture(make_data, scope="module", name="data")


@pytest.fixture
def saved(tmp_path):
    """Return save(changes of config, of its backbone) -> the folder of a model."""
    model = RecommenderModel(CONFIG)
    model.tokenizer = ItemTokenizer(items=ITEMS)
    folder = tmp_path / "model"
    model.save_pretrained(folder)

    def save(changes=(), of_backbone=()):
        config = json.loads((folder / "config.json").read_text())
        config |= dict(changes)
        config["backbone"] |= dict(of_backbone)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return save


# ------------------------------------------------------------------------------------------- pickle

FORBIDDEN = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "subprocess",
}
CALLS = {"eval", "exec", "compile", "__import__"}
PICKLING = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}


def calls_of(path):
    """Yield the dotted name of each call in a file, and its arguments by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            named = {each.arg: ast.unparse(each.value) for each in node.keywords}
            yield ast.unparse(node.func), named


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_file_unpickles_or_runs_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        used = FORBIDDEN & {name.partition(".")[0] for name in names}
        assert used == ({"subprocess"} & used if path.name == "native.py" else set())  # a compiler
    for name, named in calls_of(path):
        assert name not in CALLS
        assert not name.startswith(("os.system", "os.exec", "os.spawn", "os.popen"))
        assert name not in ("torch.load", "yaml.load", "yaml.unsafe_load")
        assert name not in ("np.load", "numpy.load") or named.get("allow_pickle") == "False"
        assert named.get("trust_remote_code", "False") != "True"
        assert name.rpartition(".")[2] not in PICKLING, "processes send each other tensors alone"


def test_nothing_is_unpickled_on_the_way_from_training_to_recommendations(
    data, tmp_path, monkeypatch
):
    pytest.importorskip("faiss")
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(data, tmp_path / "run", **settings).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")

    def poisoned(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, poisoned)
    load = torch.load
    monkeypatch.setattr(
        torch,
        "load",
        lambda *args, **kwargs: load(*args, **kwargs) if kwargs["weights_only"] else poisoned(),
    )
    trainer = make_trainer(data, tmp_path / "run", **settings)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(tmp_path / "final")
    model = RecommenderModel.from_pretrained(tmp_path / "final")
    ItemIndex.build(model).save(tmp_path / "final")
    index = ItemIndex.load(tmp_path / "final")
    assert model.recommend([data[0].items[:3]], index=index)[0]


def test_pickled_weights_are_not_read(saved):
    folder = saved()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises((HfReceError, OSError), match=r"model\.safetensors|safetensors"):
        RecommenderModel.from_pretrained(folder)


# -------------------------------------------------------------------------------------- remote code


@pytest.mark.parametrize("place", ["model", "backbone", "tokenizer"])
def test_code_in_a_repository_is_not_run(place, saved):
    own = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    folder = saved(*{"model": (own,), "backbone": ((), own), "tokenizer": ()}[place])
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    if place == "tokenizer":
        path = folder / "tokenizer_config.json"
        changes = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert RecommenderModel.from_pretrained(folder).tokenizer.items == ITEMS
    assert isinstance(AutoModel.from_pretrained(folder), RecommenderModel)
    assert not (folder / "ran").exists()


def test_a_backbone_that_only_the_repository_knows_is_refused(saved):
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps({**config, "backbone": own}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ArgumentError, match="backbone='evil': no decoder"):
        RecommenderModel.from_pretrained(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("place", ["model", "backbone", "of the backbone, by the model"])
@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
def test_a_kernel_from_elsewhere_is_refused(name, place, saved):
    if place == "model":
        folder = saved({name: "org/kernel"})
    elif place == "backbone":
        folder = saved((), {name: "org/kernel"})
    else:
        folder = saved({f"_{name}": {"backbone": "org/kernel:function"}})
    with pytest.raises(ArgumentError, match=rf"{name}='org/kernel.*might be code from elsewhere"):
        RecommenderModel.from_pretrained(folder)


@pytest.mark.parametrize("config", [RecommenderConfig, SASRecConfig])
def test_no_configuration_of_ours_names_a_kernel(config):
    with pytest.raises(ArgumentError, match="attn_implementation='org/kernel'"):
        config(attn_implementation="org/kernel")
    assert config(attn_implementation="eager")._attn_implementation == "eager"


def test_a_configuration_from_elsewhere_names_no_kernel():
    llama = LlamaConfig(attn_implementation="org/kernel")
    with pytest.raises(ArgumentError, match="attn_implementation='org/kernel'"):
        RecommenderConfig(backbone=llama)


# ---------------------------------------------------------------------------------- files elsewhere


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors"])
def test_an_index_of_weights_names_no_file_elsewhere(name, saved):
    folder = saved()
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"item_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="names files elsewhere"):
        RecommenderModel.from_pretrained(folder)


def test_shards_that_are_links_are_read(saved, tmp_path):
    folder = saved()
    model = RecommenderModel.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="2KB")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    again = RecommenderModel.from_pretrained(folder)
    assert torch.equal(again.item_head.weight, model.item_head.weight)


def test_a_tokenizer_reads_its_items_from_its_own_folder(saved, tmp_path):
    folder = saved()
    (tmp_path / "other.json").write_text(json.dumps([f"x{i}" for i in range(29)]))
    path = folder / "tokenizer_config.json"
    other = {"items_file": str(tmp_path / "other.json")}
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    assert RecommenderModel.from_pretrained(folder).tokenizer.items == ITEMS


def test_an_index_of_items_opens_no_file_elsewhere(saved, tmp_path):
    faiss = pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).standard_normal((29, 16)).astype("float32")
    centres = faiss.IndexFlatL2(16)
    lists = faiss.IndexIVFFlat(centres, 16, 2)
    lists.train(vectors)
    on_disk = faiss.OnDiskInvertedLists(2, lists.code_size, str(tmp_path / "elsewhere"))
    lists.replace_invlists(on_disk)
    lists.add(vectors)
    model = RecommenderModel.from_pretrained(saved())
    ItemIndex.build(model).save(tmp_path / "index")
    faiss.write_index(lists, str(tmp_path / "index" / INDEX_FILE))
    with pytest.raises(DataError, match=r"index in .*: Error"):
        ItemIndex.load(tmp_path / "index")


def test_an_index_of_another_size_is_refused(saved, tmp_path):
    pytest.importorskip("faiss")
    ItemIndex.build(RecommenderModel.from_pretrained(saved())).save(tmp_path)
    path = tmp_path / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_rows": 10**12}))
    with pytest.raises(DataError, match="n_rows is"):
        ItemIndex.load(tmp_path)


FINISHED = "_finished-config.json"


def leave(folder, names, *there):
    """Leave in a folder what complete_files leaves when it is killed while files move."""
    (folder / FINISHED).mkdir()
    for name in there:
        (folder / FINISHED / name).parent.mkdir(exist_ok=True)
        (folder / FINISHED / name).write_text("evil")
    text = names if isinstance(names, str) else json.dumps(names)
    (folder / FINISHED / "_names.json").write_text(text)


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "../elsewhere"],
        ["{elsewhere}"],
        ["deep/../../elsewhere"],
        [""],
        ["config.json", 3],
        {"config.json": 1},
        "config.json",
        "[" * 100_000,
        "\udce9",
        "null",
    ],
    ids=lambda names: str(names)[:20].encode("ascii", "replace").decode(),
)
def test_what_a_killed_process_left_moves_nothing_elsewhere(names, saved, tmp_path):
    folder = saved()
    if names == "\udce9":
        leave(folder, [], "config.json")
        (folder / FINISHED / "_names.json").write_bytes(b"\xff")
    else:
        text = names if isinstance(names, str) else json.dumps(names)
        leave(folder, text.replace("{elsewhere}", str(tmp_path / "elsewhere")), "config.json")
    (folder / "elsewhere").write_text("evil")  # "../elsewhere" of what was left
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for load in (RecommenderModel.from_pretrained, RecommenderModel(CONFIG).save_pretrained):
        with pytest.raises(DataError, match=rf"{FINISHED}: .* Delete it"):
            load(folder)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_killed_process_left_is_not_moved_through_links(saved, tmp_path):
    folder = saved()
    (tmp_path / "home").mkdir()
    (folder / "deep").symlink_to(tmp_path / "home")
    leave(folder, ["deep/.profile"], "deep/.profile")
    with pytest.raises(DataError, match=r"'deep/.profile' would be moved elsewhere"):
        RecommenderModel.from_pretrained(folder)
    assert not any((tmp_path / "home").iterdir())


def test_files_elsewhere_are_not_moved_here(saved, tmp_path):
    folder = saved()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text("secret")
    leave(folder, ["deep/key", "model.safetensors"])
    (folder / FINISHED / "deep").symlink_to(tmp_path / "home")
    RecommenderModel.from_pretrained(folder)
    assert (tmp_path / "home" / "key").read_text() == "secret"
    assert not (folder / "deep").exists()


def test_a_snapshot_of_the_hub_is_left_alone(saved, tmp_path):
    folder = saved()
    leave(folder, ["config.json"], "config.json")
    names = folder / FINISHED / "_names.json"
    names.rename(tmp_path / "blob")
    names.symlink_to(tmp_path / "blob")
    RecommenderModel.from_pretrained(folder)
    assert (folder / FINISHED / "config.json").read_text() == "evil"


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "value"),
    [
        ("vocab_size", 10**15),
        ("vocab_size", -5),
        ("vocab_size", 0),
        ("vocab_size", "30"),
        ("hidden_size", 10**15),
        ("hidden_size", -8),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("max_position_embeddings", 10**15),
    ],
)
def test_sizes_that_no_model_has_are_refused(size, value, saved):
    folder = saved({size: value}) if size == "vocab_size" else saved((), {size: value})
    with pytest.raises(HfReceError, match=f"{size}={value!r}"):
        RecommenderModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"type": "lma", "n_cells": 10**15}, "n_cells=1000000000000000"),
        ({"type": "compositional", "radices": [10**9, 10**9]}, "2000000000 rows of factors"),
        ({"type": "compositional", "compression": -1}, "compression=-1"),
    ],
)
def test_tables_larger_than_what_they_compress_are_refused(table, message, saved):
    with pytest.raises(ArgumentError, match=message):
        RecommenderModel.from_pretrained(saved({"item_embedding": table}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layers", "problem"), [(1, "have besides"), (3, "lack")])
def test_weights_are_neither_dropped_nor_made_up(layers, problem, saved):
    with pytest.raises(DataError, match=f"they {problem} backbone"):
        RecommenderModel.from_pretrained(saved((), {"num_hidden_layers": layers}))


# ------------------------------------------------------------------------------------------- tokens


def test_a_token_is_in_no_file_and_no_log(data, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("hf_rece", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.DEBUG)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    trainer = make_trainer(data, tmp_path / "run", **settings, hub_token=TOKEN)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    shown = capfd.readouterr()
    assert TOKEN not in caplog.text + shown.out + shown.err
    assert trainer.args.hub_token == TOKEN


ARGUMENTS = [
    "training.args:LargeVocabTrainingArguments",
    "training.args:RecommenderTrainingArguments",
    "training.sft:LargeVocabSFTConfig",
    "training.finetune:FinetuneDefaults",
    "cli:TrainDefaults",
    "cli:PretrainDefaults",
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's defaults
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_show_no_token(name, tmp_path):
    module, _, name = name.partition(":")
    if module in ("training.sft", "training.finetune"):
        pytest.importorskip("trl")
    made = getattr(import_module(f"hf_rece.{module}"), name)
    arguments = made(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True, bf16=False)
    assert TOKEN not in repr(arguments) + str(arguments) + arguments.to_json_string()
    assert TOKEN.encode() not in pickle.dumps(arguments)


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", TOKEN, "--save_strategy", "nonsense"],
        ["--hub_tokn", TOKEN],
        [f"--hub_tokn={TOKEN}"],
        ["run.yaml"],
    ],
)
def test_a_command_line_that_is_refused_shows_no_token(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f'seed: 1\nhub_token: "{TOKEN}\nuse_cpu: true\n')
    with pytest.raises(HfReceError) as caught:
        cli.parse((cli.TrainDefaults,), words, "train")
    assert TOKEN[:12] not in str(caught.value)
    wanted = "not YAML: found unexpected end" if "run.yaml" in words else "hf_***"
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    "token", [TOKEN, f"{TOKEN}\\n", "hf_jwt_" + 3 * f"{TOKEN[3:]}.", "hf_oauth_" + 20 * "a"]
)
def test_what_the_hub_s_client_says_of_its_headers_shows_no_token(token):
    error = HubError("user/shop", f"Illegal header value b'Bearer {token}'", "Try again")
    assert "Bearer hf_***" in str(error)
    assert token[-12:] not in str(error)


def test_names_that_look_like_tokens_are_shown():
    shown = "hf_rece.serving.item_index_of_everything and hf_of_user"
    assert shown in str(HubError(shown, "a", "b"))


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f" {TOKEN}", f"{TOKEN}é"])
@pytest.mark.parametrize("kind", ["push", "load", "arguments"])
def test_a_token_that_cannot_be_sent_is_refused_unseen(kind, token, tmp_path):
    use = {
        "push": lambda: RecommenderModel(CONFIG).push_to_hub("user/shop", token=token),
        "load": lambda: RecommenderModel.from_pretrained("user/shop", token=token),
        "arguments": lambda: RecommenderTrainingArguments(str(tmp_path), hub_token=token),
    }[kind]
    with pytest.raises(ArgumentError, match=r"token='\.\.\.': it holds characters") as caught:
        use()
    assert TOKEN not in str(caught.getrepr(style="long", showlocals=False))
    assert caught.value.__cause__ is None
