"""Sparse weights in a checkpoint."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config, LlamaConfig

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig
from hf_rece.errors import ArgumentError, DataError
from hf_rece.models.sparse_checkpoint import (
    holds,
    pack_bits,
    pack_state_dict,
    pack_weight,
    unpack_bits,
    unpack_state_dict,
    unpack_weight,
)

TABLE = "backbone.embed_tokens.weight"
BACKBONES = {
    "sasrec": lambda: SASRecConfig(hidden_size=16, max_position_embeddings=20),
    "gpt2": lambda: GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=20),
    "llama": lambda: LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    ),
}


def sparse_model(backbone="sasrec", n_items=30, density=0.1, **knobs):
    """A model with masks; the first active weight of each is 0, as if just grown."""
    config = RecommenderConfig(backbone=BACKBONES[backbone](), vocab_size=n_items + 1, **knobs)
    model = RecommenderModel(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            mask = torch.rand(weight.shape) < density
            mask[0, 0] = True
            weight.data.masked_fill_(~mask, 0.0)[0, 0] = 0.0
            model.weight_masks[name] = mask
    return model


def assert_same(model, again):
    for (name, left), (_, right) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(left.to(right.dtype), right), name
    assert model.weight_masks.keys() == again.weight_masks.keys()
    assert all(torch.equal(mask, again.weight_masks[n]) for n, mask in model.weight_masks.items())


# ------------------------------------------------------------------------------------ one weight


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    cast=st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_unpacking_gives_back_weight_and_mask(shape, density, dtype, cast, seed):
    torch.manual_seed(seed)
    mask = torch.rand(shape) < density
    weight = torch.randn(shape, dtype=dtype) * mask
    values, bitmask = pack_weight(weight, mask)
    assert values.numel() == mask.sum()
    again, same_mask = unpack_weight(values, bitmask.to(cast), mask.shape)
    assert torch.equal(again, weight)
    assert torch.equal(same_mask, mask)


def test_bits_are_those_of_numpy():
    mask = torch.rand(5, 7) < 0.5
    wanted = np.packbits(mask.numpy().ravel(), bitorder="little")
    assert pack_bits(mask).tolist() == wanted.tolist()


def test_a_bitmask_of_another_shape_is_refused():
    with pytest.raises(ArgumentError, match=r"bitmask=\(2,\): .*\(5, 7\) needs 5 bytes"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), torch.Size([5, 7]))


def test_lost_values_are_noticed():
    values, bitmask = pack_weight(torch.ones(4), torch.tensor([True, False, True, True]))
    with pytest.raises(ArgumentError, match=r"values=\(2,\): the bitmask has 3 active"):
        unpack_weight(values[1:], bitmask, torch.Size([4]))


# ---------------------------------------------------------------------------------- a state dict


def test_a_mask_that_no_longer_holds_is_not_applied():
    weight, mask = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([True, False, False])
    assert not holds(mask, weight)
    assert not holds(mask[:2], weight)
    assert holds(mask, weight * mask)
    assert pack_state_dict({"w": weight}, {"w": mask})["w"] is weight


def test_half_a_sparse_weight_is_refused():
    packed = pack_state_dict({"w": torch.zeros(9)}, {"w": torch.ones(9, dtype=torch.bool)})
    del packed["w:bitmask"]
    with pytest.raises(ArgumentError, match=r"state_dict='w:values': .*not whole"):
        unpack_state_dict(packed, {"w": torch.Size([9])})


# --------------------------------------------------------------------------------------- a model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_saving_and_loading_changes_no_bit(backbone, tied, tmp_path):
    model = sparse_model(backbone, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again, report = RecommenderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same(model, again)
    assert (again.item_head.weight is again.get_input_embeddings().weight) == tied


def test_auto_model_loads_sparse_weights(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModel.from_pretrained(tmp_path))


def test_sparse_weights_are_loaded_in_another_precision(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    again = RecommenderModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert_same(model, again)


def test_sparse_weights_are_loaded_from_shards(tmp_path):
    model = sparse_model(n_items=3000)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert not any({f"{TABLE}:values", f"{TABLE}:bitmask"} <= set(file) for file in files)
    assert_same(model, RecommenderModel.from_pretrained(tmp_path))


def test_what_is_loaded_is_saved_as_sparse_again(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "once")
    RecommenderModel.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = (load_file(tmp_path / n / "model.safetensors") for n in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())


def test_a_checkpoint_of_density_a_tenth_is_seven_times_smaller(tmp_path):
    model = sparse_model(n_items=20_000)
    model.save_pretrained(tmp_path / "sparse")
    model.weight_masks.clear()
    model.save_pretrained(tmp_path / "dense")
    sizes = {
        name: sum(os.path.getsize(path) for path in (tmp_path / name).iterdir())
        for name in ("sparse", "dense")
    }
    assert sizes["dense"] / sizes["sparse"] > 7


def test_a_tied_table_is_stored_once(tmp_path):
    sparse_model().save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {f"{TABLE}:values", f"{TABLE}:bitmask"} <= names
    assert not any(name.startswith("item_head") for name in names)


def test_a_model_that_was_trained_on_without_its_mask_loses_nothing(tmp_path):
    sparse_model().save_pretrained(tmp_path)
    model = RecommenderModel.from_pretrained(tmp_path)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    del model.weight_masks[TABLE]
    assert_same(model, RecommenderModel.from_pretrained(tmp_path))


def test_a_model_that_was_never_sparse_is_stored_as_before(tmp_path):
    model = sparse_model()
    model.weight_masks.clear()
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {name for name, _ in model.named_parameters()}


def test_load_state_dict_takes_sparse_weights(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    again = RecommenderModel(model.config)
    found = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["item_head.weight"], [])
    assert_same(model, again)


def test_loading_dense_weights_forgets_the_masks():
    model = sparse_model()
    model.load_state_dict(RecommenderModel(model.config).state_dict())
    assert model.weight_masks == {}


def test_the_tokenizer_is_saved_beside_sparse_weights(tmp_path):
    model = sparse_model()
    model.tokenizer = ItemTokenizer(items=[f"item {i}" for i in range(30)])
    model.save_pretrained(tmp_path)
    again = RecommenderModel.from_pretrained(tmp_path)
    answers = [m.recommend([["item 3"]], k=3) for m in (model, again)]
    assert answers[0] == answers[1]


def test_a_damaged_checkpoint_does_not_load(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    stored[f"{TABLE}:values"] = stored[f"{TABLE}:values"][1:].clone()
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=r"values=.*damaged"):
        model.load_state_dict(load_file(path), strict=False)
    with pytest.raises(DataError, match=r"its weights do not fit .* or are damaged"):
        RecommenderModel.from_pretrained(tmp_path)


def test_a_weight_whose_halves_lie_in_two_shards_loads():
    model, again = sparse_model(), sparse_model()
    whole = pack_state_dict(model.state_dict(), model.weight_masks)
    for name in whole:  # one tensor a shard
        again.load_state_dict({name: whole[name]}, strict=False)
    assert_same(model, again)
