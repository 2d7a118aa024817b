"""New items for a trained recommender."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig

from hf_rece import (
    ItemTokenizer,
    RecommenderConfig,
    RecommenderModel,
    RecommenderTrainer,
    RecommenderTrainingArguments,
    SASRecConfig,
)
from hf_rece.data.co_occurrence import co_occurring_items
from hf_rece.embeddings.digits import check_codes, widened
from hf_rece.errors import ArgumentError, DataError

ITEMS = [f"item {i}" for i in range(29)]
NEW = ["new a", "new b", "new c"]
TABLES = {
    "dense": None,
    "quotient and remainder": {"type": "compositional", "radices": [12, 6], "codes": "id"},
    "codes": {"type": "compositional", "compression": 2, "n_codes": 4},
    "given codes": {"type": "compositional", "radices": [5, 9], "codes": "given"},
    "lma": {"type": "lma", "compression": 2},
    "hashing": {"type": "lma", "compression": 2, "n_keys": 0},
}  # fmt: skip
every_table = pytest.mark.parametrize("table", TABLES)
BACKBONES = {
    "sasrec": lambda: SASRecConfig(hidden_size=16, max_position_embeddings=20, dropout=0.0),
    "llama": lambda: LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ),
}


def make(table="dense", backbone="sasrec", vocab_size=30, **knobs):
    torch.manual_seed(0)
    model = RecommenderModel(
        RecommenderConfig(
            backbone=BACKBONES[backbone](),
            vocab_size=vocab_size,
            item_embedding=TABLES[table],
            **knobs,
        )
    ).eval()
    model.tokenizer = ItemTokenizer(items=ITEMS)
    if isinstance(bias := model.item_head.bias, torch.Tensor):
        torch.nn.init.normal_(bias)
    return model


def rows_of(model, ids):
    rows = model.output_terms().rows
    return rows.rows(torch.as_tensor(ids)).detach().clone()


@every_table
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tied", [True, False])
def test_known_rows_stay_bit_for_bit_and_new_items_are_recommended(table, backbone, tied):
    model = make(table, backbone, tie_word_embeddings=tied, output_bias=True)
    known = torch.arange(30)
    table_before = model.get_input_embeddings()(known).clone()
    rows, bias = rows_of(model, known), model.item_head.bias.detach().clone()
    n_parameters = sum(p.numel() for p in model.parameters())
    before = model.recommend([ITEMS[:3]], k=26)[0]
    model.add_items(NEW)
    assert model.config.vocab_size == model.config.backbone.vocab_size == len(model.tokenizer) == 33
    assert torch.equal(model.get_input_embeddings()(known), table_before)
    assert torch.equal(rows_of(model, known), rows)
    assert torch.equal(model.item_head.bias[:30], bias)
    assert len(model.item_head.bias) == 33
    after = model.recommend([ITEMS[:3]], k=50)[0]
    scores = {found.item: found.score for found in after}
    assert set(scores) == {*ITEMS[3:], *NEW}
    assert {f.item: f.score for f in before} == pytest.approx(
        {item: score for item, score in scores.items() if item not in NEW}, abs=1e-6
    )
    if TABLES[table] is not None:  # memory and factors stay, only biases come
        assert sum(p.numel() for p in model.parameters()) == n_parameters + 3


@every_table
@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_model_reloads_bit_for_bit_and_trains_on(table, tied, tmp_path):
    model = make(table, tie_word_embeddings=tied, output_bias=True)
    model.add_items(NEW)
    model.save_pretrained(tmp_path / "grown")
    again = RecommenderModel.from_pretrained(tmp_path / "grown")
    assert again.tokenizer.items == [*ITEMS, *NEW]
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert again.recommend([[NEW[0]]], k=5) == model.recommend([[NEW[0]]], k=5)
    train = Dataset.from_dict({"item_ids": torch.randint(1, 33, (16, 6)).tolist()})
    arguments = RecommenderTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, max_length=10, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    RecommenderTrainer(again, arguments, train_dataset=train).train()
    assert not torch.equal(rows_of(again, [30, 31]), rows_of(model, [30, 31]))


def test_growing_twice_is_growing_on():
    model = make("codes")
    model.add_items(NEW[:1])
    model.add_items(NEW[1:])
    assert model.tokenizer.convert_items_to_ids(NEW) == [30, 31, 32]
    check_codes(widened(model.get_input_embeddings().codes), model.get_input_embeddings().radices)


def test_without_neighbours_dense_rows_start_at_the_mean():
    model = make(tie_word_embeddings=False)
    model.add_items(NEW)
    for weight in (model.get_input_embeddings().weight, model.item_head.weight):
        items = weight[1:30]
        distance = (weight[30:] - items.mean(0)) / items.std(0)
        assert 0 < distance.abs().max() < 0.5
        assert not torch.equal(weight[30], weight[31])


def test_neighbours_give_dense_rows_their_weighted_mean():
    model = make(output_bias=True)
    model.add_items(["x", "y"], neighbours={"x": {"item 3": 3, "item 5": 1}})
    weight, bias = model.get_input_embeddings().weight, model.item_head.bias
    centre = 0.75 * weight[4] + 0.25 * weight[6]
    assert ((weight[30] - centre).abs() < 0.5 * weight[1:30].std(0)).all()
    assert abs(bias[30] - (0.75 * bias[4] + 0.25 * bias[6])) < 0.5 * bias[1:30].std()


@pytest.mark.parametrize("table", ["codes", "given codes", "lma"])
def test_neighbours_share_with_new_items_of_compressed_tables(table):
    def likeness(neighbours):
        model = make(table)
        model.add_items(["x"], neighbours=neighbours)
        mine, theirs = rows_of(model, [30, 8])
        return float((mine == theirs).float().mean()), torch.cosine_similarity(mine, theirs, dim=0)

    shared, cosine = likeness({"x": ["item 7"]})
    assert cosine < 1 - 1e-4
    assert cosine > likeness(None)[1] + 0.2 or shared > 0.3


@pytest.mark.parametrize("table", ["quotient and remainder", "hashing"])
def test_rows_that_follow_from_the_id_have_no_neighbours(table):
    with pytest.raises(ArgumentError, match="a row follows from the id alone"):
        make(table).add_items(["x"], neighbours={"x": ["item 7"]})


def test_codes_that_are_used_up_are_named_and_nothing_changes():
    model = make("given codes")
    model.add_items([f"more {i}" for i in range(15)])
    with pytest.raises(
        ArgumentError, match=r"items=1: .*radices \(5, 9\) number 45 rows and 45 are taken"
    ):
        model.add_items(["one too many"])
    assert len(model.tokenizer) == model.config.vocab_size == 45
    codes = widened(model.get_input_embeddings().codes)
    assert len(codes.unique(dim=0)) == 45


def test_co_occurrence_finds_the_items_that_stand_near():
    histories = [
        ["item 1", "x", "item 2"],
        ["item 1", "x"],
        ["item 9", "item 1"],
        ["stranger", "x"],
    ]
    found = co_occurring_items(histories, ["x", "never"])
    assert next(iter(found["x"])) == "item 1"
    assert found["x"].keys() == {"item 1", "item 2", "stranger"}
    assert found["never"] == {}
    model = make()
    model.add_items(["x", "never"], histories=histories)
    weight = model.get_input_embeddings().weight
    near = found["x"]["item 1"], found["x"]["item 2"]
    centre = (near[0] * weight[2] + near[1] * weight[3]) / sum(near)
    assert ((weight[30] - centre).abs() < 0.5 * weight[1:30].std(0)).all()


@pytest.mark.parametrize("n_added", [1, 3])
def test_items_given_to_the_tokenizer_before_are_taken(n_added):
    model = make()
    model.tokenizer.add_items(NEW)
    model.add_items(NEW) if n_added == 3 else None
    if n_added == 1:
        with pytest.raises(ArgumentError, match="3 items that the model has no rows for"):
            model.add_items(["another"])
        return
    assert model.config.vocab_size == len(model.tokenizer) == 33
    assert {f.item for f in model.recommend([ITEMS], k=9)[0]} == set(NEW)


def test_rows_to_spare_are_never_recommended_and_taken_first():
    model = make(vocab_size=40)
    assert len(model.recommend([["item 1"]], k=99)[0]) == 28
    model.add_items(NEW)
    assert model.config.vocab_size == 40
    assert len(model.recommend([["item 1"]], k=99)[0]) == 31


def test_masks_of_sparse_weights_grow_too(tmp_path):
    model = make()
    weight = model.get_input_embeddings().weight
    mask = torch.rand(weight.shape) < 0.2
    with torch.no_grad():
        weight *= mask
    model.weight_masks = {"backbone.embed_tokens.weight": mask}
    model.add_items(NEW)
    model.save_pretrained(tmp_path)
    again = RecommenderModel.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert again.weight_masks["backbone.embed_tokens.weight"][30:].all()


@every_table
def test_resizing_grows_as_adding_items_does(table):
    model = make(table, output_bias=True)
    rows = rows_of(model, range(30))
    model.resize_token_embeddings(33)
    assert model.config.vocab_size == model.config.backbone.vocab_size == 33
    assert torch.equal(rows_of(model, range(30)), rows)
    ids = torch.randint(1, 33, (2, 7))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.add_items(NEW)
    assert model.config.vocab_size == 33
    assert model.resize_token_embeddings(None) is model.get_input_embeddings()
    model.resize_token_embeddings(33, pad_to_multiple_of=4)
    assert model.config.vocab_size == 36
    if TABLES[table] is not None:
        with pytest.raises(ArgumentError, match=r"new_num_tokens=20: .* cannot shrink"):
            model.resize_token_embeddings(20)


@pytest.mark.parametrize(
    ("items", "more", "message"),
    [
        (["item 1", "x"], {}, r"items=\['item 1'\]: 1 items are already in the vocabulary"),
        (["x", "x"], {}, r"items=\['x'\]: 1 items are given twice"),
        ([1], {}, "all integers or all strings"),
        ("x", {}, r"Pass \[item\]"),
        (["x"], {"neighbours": {"x": ["nobody"]}}, "not in the vocabulary of 29: 'nobody'"),
        (["x"], {"neighbours": {"x": "item 1"}}, "one item, not a list"),
        (["x", "y"], {"neighbours": {"x": ["y"]}}, "is itself new"),
        (["x"], {"neighbours": {"x": {"item 1": 0}}}, "not positive"),
        (["x"], {"neighbours": {"z": ["item 1"]}}, "not among the new items"),
        (["x"], {"neighbours": {}, "histories": []}, "Pass one of them"),
    ],
)
def test_bad_requests_are_named_and_change_nothing(items, more, message):
    model = make()
    with pytest.raises((ArgumentError, DataError), match=message):
        model.add_items(items, **more)
    assert model.config.vocab_size == len(model.tokenizer) == 30


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_wrapped_layers_are_refused():
    peft = pytest.importorskip("peft")
    model = make(tie_word_embeddings=False)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["item_head"]))
    with pytest.raises(ArgumentError, match="Merge or unload it first"):
        model.add_items(["x"])


def test_the_padding_token_makes_way_for_an_item_of_its_name(tmp_path):
    model = make()
    model.add_items(["[PAD]"])
    assert model.tokenizer.get_vocab()["[PAD]"] == 30
    assert model.tokenizer.pad_token_id == 0
    model.save_pretrained(tmp_path)
    assert RecommenderModel.from_pretrained(tmp_path).tokenizer.get_vocab()["[PAD]"] == 30


def test_a_checkpoint_of_another_size_is_not_resumed(tmp_path):
    model = make()
    train = Dataset.from_dict({"item_ids": torch.randint(1, 30, (16, 6)).tolist()})
    arguments = RecommenderTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, max_length=10, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    RecommenderTrainer(model, arguments, train_dataset=train).train()
    again = RecommenderModel.from_pretrained(tmp_path / "checkpoint-1")
    again.add_items(NEW)
    trainer = RecommenderTrainer(again, arguments, train_dataset=train)
    with pytest.raises(ArgumentError, match="30 rows of items, and the model has 33"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
