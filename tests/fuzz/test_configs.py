"""Settings, saved models and indexes: loaded right, or refused by an error that names the fault."""

import contextlib
import io
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers
import yaml
from hypothesis import strategies as st

from hf_rece import cli
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.errors import HfReceError
from hf_rece.losses import LOSSES, LossName, build_loss
from hf_rece.losses.options import CommonOptions
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.serving.item_index import ItemIndex
from tests.fuzz.cases import cases
from tests.fuzz.damage import changed, damaged, huge, plain

# ------------------------------------------------------------------------------------- losses


@st.composite
def loss_settings(draw):
    name = draw(st.sampled_from(get_args(LossName)))
    known = [*LOSSES[name].config.__dataclass_fields__, *CommonOptions.__annotations__]
    tensors = ("bias", "generator", "statistics")
    keys = st.sampled_from([key for key in known if key not in tensors] + ["n_bucket"])
    return name, draw(st.dictionaries(keys, plain, max_size=3))


@cases(80, loss_settings())
def test_a_loss_is_built_and_runs_or_is_refused(case):
    name, knobs = case
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=draw).requires_grad_() for n in (6, 20))
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    try:
        loss = build_loss(name, **knobs)
        again = build_loss(**json.loads(json.dumps(loss.to_dict())))
        value = loss(hidden.view(2, 3, 4), weight, labels, generator=draw)
    except HfReceError:
        return
    assert again.to_dict().keys() == loss.to_dict().keys()
    assert bool(torch.isfinite(value).all()), value
    if loss.common.get("reduction") != "none":
        for grad in torch.autograd.grad(value, (hidden, weight)):
            assert bool(torch.isfinite(grad.to_dense()).all())


# ------------------------------------------------------------------------------ configurations

CONFIG = {
    "backbone": {
        "model_type": "hf_rece_sasrec", "hidden_size": 8, "max_position_embeddings": 6,
        "num_hidden_layers": 1, "num_attention_heads": 1,
    },
    "vocab_size": 12,
    "tie_word_embeddings": True,
    "output_bias": False,
    "item_embedding": None,
    "loss_type": "rece",
    "loss_kwargs": {"n_rounds": 2},
    "pad_token_id": 0,
}  # fmt: skip
BACKBONES = (
    CONFIG["backbone"],
    {
        "model_type": "llama", "hidden_size": 8, "max_position_embeddings": 6,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 8, "hidden_act": "silu", "attn_implementation": "sdpa",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    {
        "model_type": "gpt2", "n_embd": 8, "n_positions": 6, "n_layer": 1, "n_head": 2,
        "activation_function": "gelu_new", "embd_pdrop": 0.1,
    },
)  # fmt: skip
TABLES = (
    None,
    {"type": "dense"},
    {"type": "compositional", "operation": "concat", "compression": 2, "codes": "id"},
    {"type": "compositional", "operation": "mult", "radices": [4, 4], "codes": "given"},
    {"type": "lma", "n_cells": 40, "n_keys": 2, "n_hashes": 1, "seed": 0},
)


@st.composite
def configurations(draw):
    table, backbone = draw(st.sampled_from(TABLES)), draw(st.sampled_from(BACKBONES))
    settings = {**CONFIG, "item_embedding": table, "backbone": backbone}
    return draw(changed(settings, plain | huge))


@cases(80, configurations())
def test_a_configuration_survives_json_or_is_refused(case):
    try:
        config = RecommenderConfig(**case)
    except HfReceError:
        return
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        again = RecommenderConfig.from_pretrained(folder)
    assert again.to_dict() == config.to_dict() or "nan" in str(config.to_dict())


# --------------------------------------------------------------------------------- saved models

MODELS = [
    *({"item_embedding": table} for table in TABLES),
    *({"backbone": backbone} for backbone in BACKBONES[1:]),
]
ITEMS = [f"item {i}" for i in range(11)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of small recommenders, one for each kind of table and of backbone."""
    folders = []
    for number, changes in enumerate(MODELS):
        model = RecommenderModel(RecommenderConfig(**{**CONFIG, **changes}))
        model.tokenizer = ItemTokenizer(items=ITEMS)
        folder = tmp_path_factory.mktemp(f"model{number}")
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"attn_implementation": "sdpa", "output_attentions": False}
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    return folders


@st.composite
def damages(draw):
    """Which model, which file of it, and what is done to the file."""
    files = ("config.json", "model.safetensors", "items.json", "tokenizer_config.json")
    name = draw(st.sampled_from([*files, "config.json", "config.json", "model.safetensors"]))
    if name.endswith(".json") and draw(st.sampled_from([True, True, False])):
        damage = ("settings", draw(st.randoms(use_true_random=False)), draw(plain | huge))
    else:
        kinds = st.sampled_from(["cut", "flip", "flip", "insert", "empty"])
        place = st.floats(0, 1, exclude_max=True) | st.floats(0, 0.02)
        damage = (draw(kinds), draw(place), draw(st.binary(min_size=1, max_size=4)))
    return draw(st.integers(0, len(MODELS) - 1)), name, damage


HISTORY = [["item 3", "item 7"]]


def load(folder):
    """The model, without transformers' reports of what it found."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        return RecommenderModel.from_pretrained(folder)
    finally:
        transformers.logging.set_verbosity_warning()
        transformers.logging.enable_progress_bar()


def scores_of(model):
    """The scores of the items that are not in HISTORY, by name."""
    items = model.tokenizer.items
    scores = model.item_vectors() @ model.user_vectors(HISTORY)[0]
    return {item: s for item, s in zip(items, scores, strict=True) if item not in HISTORY[0]}


def test_a_damaged_model_is_loaded_or_refused(saved):

    @cases(60, damages())
    def test_damaged_models(case):
        which, name, damage = case
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shutil.copytree(saved[which], folder, dirs_exist_ok=True)
            path = Path(folder) / name
            path.write_bytes(damaged(path.read_bytes(), damage))
            try:
                model = load(folder)
                answers = model.recommend(HISTORY, k=3)
            except HfReceError:
                return
            comparable = [score for score in scores_of(model).values() if score > -torch.inf]
            assert len(answers[0]) == min(3, len(comparable))

    test_damaged_models()


# ------------------------------------------------------------------------- indexes and YAML files


@st.composite
def index_damages(draw):
    """What is done to an index: to its settings, or its file cut short."""
    if draw(st.sampled_from([True, True, True, False])):
        return "item_index.json", ("settings", draw(st.randoms(use_true_random=False)), draw(plain))
    name = draw(st.sampled_from(["item_index.json", "item_index.faiss"]))
    return name, ("cut", draw(st.floats(0, 1, exclude_max=True)), b"")


def test_a_damaged_index_is_loaded_or_refused(saved, tmp_path):
    pytest.importorskip("faiss")
    model = load(saved[0])
    ItemIndex.build(model).save(tmp_path)
    expected = model.recommend(HISTORY, k=3, index=ItemIndex.load(tmp_path))

    @cases(40, index_damages())
    def test_damaged_indexes(case):
        name, damage = case
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
            path = Path(folder) / name
            path.write_bytes(damaged(path.read_bytes(), damage))
            try:
                answers = model.recommend(HISTORY, k=3, index=ItemIndex.load(folder))
            except HfReceError:
                return
            assert len(answers[0]) == len(expected[0])

    test_damaged_indexes()


YAML = {
    "min_user_interactions": 3, "split": "temporal", "test_quantile": 0.9, "backbone": "sasrec",
    "hidden_size": 8, "max_length": 10, "item_embedding": "lma", "loss_type": "rece",
    "loss_kwargs": {"n_rounds": 2}, "memory_budget": "1GiB", "learning_rate": 1e-3, "seed": 1,
    "num_train_epochs": 1, "per_device_train_batch_size": 8, "density": 0.1, "use_cpu": True,
    "report_to": "none", "eval_strategy": "epoch", "nonfinite_loss": "skip", "filter_seen": True,
    "ranking_ks": [5, 10],
}  # fmt: skip


@st.composite
def yaml_files(draw):
    """A YAML file of `hf-rece train`, with other values in it or other bytes."""
    settings = draw(changed(YAML))
    text = yaml.safe_dump(settings).encode()
    if draw(st.sampled_from([True, False, False])):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(min_size=1, max_size=3)) + text[place:]
    return text


@cases(30, yaml_files())
def test_a_yaml_file_is_read_or_refused(case):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.yaml"
        path.write_bytes(case)
        types = (cli.DataArguments, cli.ModelArguments, cli.TrainDefaults, cli.SparsityArguments)
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                cli.parse(types, [str(path), "--output_dir", folder], "train")
            except (HfReceError, SystemExit):  # argparse says what is wrong, and exits
                return
