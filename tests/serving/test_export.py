"""Exported encoders, run and compared."""

import sys

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig
from hf_rece.errors import ArgumentError
from hf_rece.serving.export import export_encoder
from tests.models.test_growth import ITEMS, TABLES

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
BACKBONES = {
    "sasrec": lambda: SASRecConfig(hidden_size=16, max_position_embeddings=20),
    "gpt2": lambda: GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=20),
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
}
HISTORIES = [ITEMS[:3], ITEMS[5:12], ITEMS[20:21], ITEMS[:20], ITEMS[3:8]]


def make(backbone="sasrec", table="dense"):
    torch.manual_seed(0)
    model = RecommenderModel(
        RecommenderConfig(
            backbone=BACKBONES[backbone](), vocab_size=30, item_embedding=TABLES[table]
        )
    ).train()
    model.tokenizer = ItemTokenizer(items=ITEMS)
    return model


def inputs(model, side):
    return model.tokenizer(HISTORIES, padding=True, padding_side=side, return_tensors="pt")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "backbone",
    ["sasrec", "llama", pytest.param("gpt2", marks=slow), pytest.param("qwen3", marks=slow)],
)
def test_the_exported_graph_gives_the_users_vectors(backbone, tmp_path):
    model = make(backbone)
    export_encoder(model, tmp_path / "encoder.pt2")
    assert model.training
    graph = torch.export.load(tmp_path / "encoder.pt2").module()
    for side in ("left", "right"):
        batch = inputs(model, side)
        vectors = graph(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(vectors, model.user_vectors(HISTORIES), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "table",
    [
        "codes",
        "lma",
        *(pytest.param(name, marks=slow) for name in ("quotient and remainder", "hashing")),
    ],
)
def test_compressed_tables_are_exported_compressed(table, tmp_path):
    model = make(table=table)
    export_encoder(model, tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2")
    batch = inputs(model, "right")
    vectors = program.module()(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(vectors, model.user_vectors(HISTORIES), atol=1e-5, rtol=1e-4)
    assert not any(tensor.shape == (30, 16) for tensor in program.state_dict.values())


@pytest.mark.parametrize(
    ("backbone", "table"),
    [
        ("sasrec", "codes"),
        *(pytest.param(name, "dense", marks=slow) for name in ("sasrec", "gpt2", "llama")),
    ],
)
def test_onnx_runs_the_same_graph(backbone, table, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = make(backbone, table)
    export_encoder(model, tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(tmp_path / "encoder.onnx")
    for side in ("left", "right"):
        batch = {name: tensor.numpy() for name, tensor in inputs(model, side).items()}
        (vectors,) = session.run(["user_vectors"], batch)
        wanted = model.user_vectors(HISTORIES).numpy()
        np.testing.assert_allclose(vectors, wanted, atol=1e-5, rtol=1e-3)


def test_an_unsupported_target_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"path='encoder.tflite': no such target.*\.pt2"):
        export_encoder(make(), tmp_path / "encoder.tflite")


def test_an_unsupported_backbone_gives_one_message(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("data-dependent\nmore\nlines")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(ArgumentError, match=r"backbone='llama': torch cannot.*: data-dependent\. "):
        export_encoder(make("llama"), tmp_path / "encoder.pt2")
    assert not (tmp_path / "encoder.pt2").exists()


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ArgumentError, match=r'pip install "hf_rece\[onnx\]"'):
        export_encoder(make(), tmp_path / "encoder.onnx")
