"""Loading: precision, devices, Auto classes; and one clear message for what cannot be loaded."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from hf_rece import (
    ArgumentError,
    DataError,
    ItemTokenizer,
    RecommenderConfig,
    RecommenderModel,
    SASRecConfig,
    SASRecModel,
)

ITEMS = [f"item {i}" for i in range(59)]
HISTORIES = [["item 3", "item 7"], ["item 1"]]
KINDS = {
    "dense": None,
    "compositional": {"type": "compositional", "compression": 2},
    "codes": {"type": "compositional", "radices": [8, 8], "codes": "given"},
    "lma": {"type": "lma", "compression": 2},
    "sparse": None,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind="dense", backbone=None):
    torch.manual_seed(0)
    backbone = backbone or SASRecConfig(hidden_size=16, max_position_embeddings=20)
    config = RecommenderConfig(backbone=backbone, vocab_size=60, item_embedding=KINDS[kind])
    model = RecommenderModel(config).eval()
    model.tokenizer = ItemTokenizer(items=ITEMS)
    if kind == "sparse":
        name = "backbone.embed_tokens.weight"
        weight = model.get_parameter(name)
        model.weight_masks[name] = torch.rand(weight.shape) < 0.3
        weight.data *= model.weight_masks[name]
    return model


@every_kind
def test_auto_classes_load_a_recommender(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is RecommenderModel
    assert again.recommend(HISTORIES) == model.recommend(HISTORIES)
    assert AutoConfig.from_pretrained(tmp_path).item_embedding == KINDS[kind]
    assert AutoTokenizer.from_pretrained(tmp_path).items == ITEMS


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_precision_and_devices_leave_tables_and_masks_alone(kind, dtype, device_map, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    again = RecommenderModel.from_pretrained(tmp_path, dtype=dtype, device_map=device_map)
    assert again.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    expected = dict(model.to(again.dtype).state_dict())
    torch.testing.assert_close(again.state_dict(), expected, rtol=0, atol=0)
    assert again.weight_masks.keys() == model.weight_masks.keys()
    for name, mask in model.weight_masks.items():
        assert torch.equal(again.weight_masks[name], mask)
    if again.dtype == torch.float32:
        assert again.recommend(HISTORIES) == model.recommend(HISTORIES)


@every_kind
def test_layers_on_disk_answer_alike(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path / "model")
    layers = {f"backbone.layers.{i}": "disk" for i in range(2)}
    rest = {name: "cpu" for name, _ in model.named_children()}
    rest = {f"backbone.{name}": "cpu" for name, _ in model.backbone.named_children()} | rest
    del rest["backbone"], rest["backbone.layers"]
    again = RecommenderModel.from_pretrained(
        tmp_path / "model", device_map=rest | layers, offload_folder=tmp_path / "disk"
    )
    assert again.recommend(HISTORIES) == model.recommend(HISTORIES)


def test_loading_needs_no_second_copy_of_the_weights(tmp_path):
    """Made on the meta device: what is not in the checkpoint never gets memory first."""
    model = make("compositional")
    model.save_pretrained(tmp_path)
    again, info = RecommenderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert again.tokenizer.items == ITEMS
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert not any(tensor.is_meta for tensor in again.buffers())


# ------------------------------------------------------------------------- without the package

WITHOUT = """
import sys
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 2)
except Exception as error:
    print(error)
assert "hf_rece" not in sys.modules
"""
# A directory with this file before all others hides the package from an interpreter.
HIDING = "raise ModuleNotFoundError(\"No module named 'hf_rece'\", name='hf_rece')"


def said_without_the_package(folder, tmp_path, *words):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "hf_rece.py").write_text(HIDING)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=hidden,
        env={"PYTHONPATH": str(hidden), "PATH": "/usr/bin", "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_without_the_package_the_repository_says_what_to_install(tmp_path):
    make().save_pretrained(tmp_path / "shop")
    assert "`pip install hf_rece`" in (tmp_path / "shop" / "README.md").read_text()
    assert "auto_map" not in json.loads((tmp_path / "shop" / "config.json").read_text())
    said = said_without_the_package(tmp_path / "shop", tmp_path)
    assert "hf_rece_recommender" in said


@pytest.fixture
def with_code(monkeypatch):
    for each in (RecommenderModel, RecommenderConfig):
        monkeypatch.setattr(each, "_auto_class", None)
        each.register_for_auto_class()


def test_code_goes_with_the_model_on_request(with_code, tmp_path):
    make().save_pretrained(tmp_path / "shop")
    config = json.loads((tmp_path / "shop" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"}
    assert type(AutoModel.from_pretrained(tmp_path / "shop")) is RecommenderModel
    assert "trust_remote_code=True" in said_without_the_package(tmp_path / "shop", tmp_path)


def test_trusted_code_asks_for_the_package(with_code, tmp_path):
    make().save_pretrained(tmp_path / "shop")
    said = said_without_the_package(tmp_path / "shop", tmp_path, "trust")
    assert "`pip install hf_rece`" in said


# ---------------------------------------------------------------------------------- what is wrong


def test_another_model_is_refused(tmp_path):
    config = GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=20)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    message = r"pretrained_model_name_or_path=.*: it holds another model \(gpt2, GPT2LMHeadModel\)"
    with pytest.raises(ArgumentError, match=message):
        RecommenderModel.from_pretrained(tmp_path)


def test_a_backbone_alone_is_refused(tmp_path):
    SASRecModel(SASRecConfig(hidden_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"another model \(hf_rece_sasrec"):
        RecommenderModel.from_pretrained(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"there is no config.json in it"):
        RecommenderModel.from_pretrained(tmp_path)


def test_a_tokenizer_with_more_items_than_rows_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "items.json").write_text(json.dumps([*ITEMS, "one more"]))
    message = r"tokenizer='60 items': the model has vocab_size=60, rows for 59 items"
    with pytest.raises(ArgumentError, match=message):
        RecommenderModel.from_pretrained(tmp_path)


def test_a_tokenizer_set_by_hand_is_checked_too():
    model = make()
    model.tokenizer = ItemTokenizer(items=[*ITEMS, "one more"])
    with pytest.raises(ArgumentError, match=r"tokenizer='60 items'"):
        model.recommend(HISTORIES)


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "length", "header", "last byte"])
def test_weights_cut_short_are_named(keep, tmp_path):
    make().save_pretrained(tmp_path / "shop")
    path = tmp_path / "shop" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = r"shop, model.safetensors: damaged or cut short .* Copy or download it again"
    for load in (RecommenderModel, AutoModel):
        with pytest.raises(DataError, match=message):
            load.from_pretrained(tmp_path / "shop")


def test_weights_that_are_garbage_are_named(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=r"model.safetensors: damaged"):
        RecommenderModel.from_pretrained(tmp_path)


def test_the_damaged_one_of_several_files_is_named(tmp_path):
    make(backbone=LlamaConfig(**LLAMA)).save_pretrained(tmp_path, max_shard_size="4KB")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=path.name):
        RecommenderModel.from_pretrained(tmp_path)


LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def test_weights_of_another_shape_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["backbone.embed_tokens.weight"] = torch.zeros(50, 16)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"its weights do not fit its config.json"):
        RecommenderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_damaged_size_takes_no_memory(name, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    place = settings if name in settings else settings["backbone"]
    place[name] = 2**20
    path.write_text(json.dumps(settings))
    with (
        mock.patch.object(RecommenderModel, "_init_weights") as made,
        pytest.raises(DataError, match=r"has shape \[.*\], and the model wants \[.*1048576"),
    ):
        RecommenderModel.from_pretrained(tmp_path)
    made.assert_not_called()


def test_damaged_codes_of_items_are_named(tmp_path):
    make("codes").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("codes"))
    weights[name][-1, 0] = 200
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"codes of its items are damaged.*digit 0"):
        RecommenderModel.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        RecommenderModel.from_pretrained(tmp_path)


def test_items_that_are_no_json_are_named(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "items.json").write_text('["item 1", ')
    with pytest.raises(DataError, match=r"items.json: no JSON list"):
        RecommenderModel.from_pretrained(tmp_path)


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}
UNUSABLE = [
    ({"model_type": "llama", **LLAMA}, "hidden_act", "foo"),
    ({"model_type": "llama", **LLAMA}, "hidden_act", 3),
    ({"model_type": "llama", **LLAMA}, "rope_parameters", {"rope_type": "foo"}),
    ({"model_type": "llama", **LLAMA}, "num_attention_heads", 0),
    ({"model_type": "llama", **LLAMA}, "output_hidden_states", 2.5),
    (GPT2, "activation_function", "foo"),
    (GPT2, "n_head", 3),
    (GPT2, "attn_pdrop", -1),
    (GPT2, "embd_pdrop", float("nan")),
    (GPT2, "n_inner", -1),
    ({"hidden_size": 16}, "layer_norm_eps", None),
    ({"hidden_size": 16}, "dtype", "foo"),
]


@pytest.mark.parametrize(("backbone", "setting", "value"), UNUSABLE)
def test_settings_that_no_backbone_can_be_made_of_are_refused(backbone, setting, value, tmp_path):
    RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=60)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["backbone"][setting] = value
    path.write_text(json.dumps(config))
    with pytest.raises((ArgumentError, DataError), match=rf"{setting}|settings cannot be used"):
        RecommenderModel.from_pretrained(tmp_path)
    with pytest.raises(ArgumentError):
        RecommenderModel(RecommenderConfig(backbone={**backbone, setting: value}, vocab_size=60))


@pytest.mark.parametrize(
    "settings", [{"output_attentions": True}, {"dtype": "foo"}, {"id2label": {"a": 1}}]
)
def test_a_configuration_refuses_what_transformers_does_by_our_errors(settings):
    with pytest.raises(ArgumentError):
        RecommenderConfig(attn_implementation="sdpa", **settings)


@pytest.mark.parametrize("value", [{}, 3, {"quant_method": "foo"}])
def test_a_quantization_that_is_none_is_refused(value, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": value}))
    with pytest.raises((ArgumentError, DataError), match=r"config\.json|config="):
        RecommenderModel.from_pretrained(tmp_path)
