"""A recommender whose vocabulary is cut over processes: made, cut, asked, and refused."""

import pytest
import torch
from transformers import LlamaConfig

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.errors import ArgumentError, DataError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from tests.head.steps import LargestTensors
from tests.processes import assert_messages_fit, in_processes, record_messages

N_ITEMS = 50
HISTORIES = [["i3", "i9", "i3"], ["i40"], ["i1", "i2", "i50"]]
BACKBONES = {
    "sasrec": lambda: SASRecConfig(hidden_size=16, num_hidden_layers=1, dropout=0.0),
    "llama": lambda: LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ),
}


def config_of(backbone, n_rows=N_ITEMS + 1, **settings):
    return RecommenderConfig(backbone=BACKBONES[backbone](), vocab_size=n_rows, **settings)


def whole_model(backbone, **settings):
    torch.manual_seed(0)
    model = RecommenderModel(config_of(backbone, **settings))
    model.tokenizer = ItemTokenizer(items=[f"i{n}" for n in range(1, N_ITEMS + 1)])
    return model


def answers(model):
    limits = {"denied_items": ["i7", "i8"], "allowed_items": [f"i{n}" for n in range(5, 30)]}
    vectors = [model.user_vectors(HISTORIES), model.item_vectors(), model.item_vectors(["i2"])]
    return {
        "plain": model.recommend(HISTORIES, k=6),
        "limited": model.recommend(HISTORIES, k=30, filter_seen=False, **limits),
        "vectors": [part.tolist() for part in vectors],
    }


def step(model, ids, labels):
    loss = model.train()(input_ids=ids, labels=labels, num_items_in_batch=5).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def batch():
    ids = torch.randint(1, N_ITEMS + 1, (4, 5), generator=torch.Generator().manual_seed(0))
    return ids, ids.roll(-1, 1)


def lopsided():
    """A batch whose second half has no label."""
    ids, labels = batch()
    return ids, labels.index_fill(0, torch.tensor([2, 3]), -100)


def ranks(model, ids, labels):
    with torch.no_grad():
        output = model.eval()(input_ids=ids, labels=labels, seen_ids=ids, rank_k=4)
    return output.greater, output.tied, output.topk_ids, output.losses


def told(call):
    with pytest.raises((ArgumentError, DataError)) as caught:
        call()
    return str(caught.value)


def of_processes(rank, world_size, folder):
    found = {}
    for backbone in BACKBONES:
        model = whole_model(backbone, output_bias=True)
        model.cut_vocabulary()
        model.cut_vocabulary()  # again changes nothing
        own = slice(2 * rank, 2 * rank + 2)
        found[backbone] = answers(model), step(model, *(part[own] for part in batch()))
    ids, labels = lopsided()
    model = whole_model("sasrec")
    model.cut_vocabulary()
    found["lopsided"] = *step(model, ids[own], labels[own]), ranks(model, ids[own], labels[own])
    model = whole_model("llama", output_bias=True)
    model.cut_vocabulary()
    torch.manual_seed(rank)
    spy = LargestTensors(N_ITEMS, 16)
    with spy:
        large = RecommenderModel(config_of("sasrec", 60_000), vocab_parallel=True)
    found["largest rows"] = max([shape[0] for _, shape in spy.logits], default=0)
    found["first rows"] = large.item_head.weight[:2].tolist()
    found["is tied"] = large.item_head.weight is large.get_input_embeddings().weight
    found["std"] = float(large.item_head.weight.detach().std())
    torch.manual_seed(0)
    found["drawn"] = RecommenderModel(config_of("sasrec", 9001), vocab_parallel=True)
    found["drawn"] = found["drawn"].item_head.weight.detach()
    found["ignored by DDP"] = sorted(model._ddp_params_and_buffers_to_ignore)
    model.save_pretrained(folder)
    other = config_of("llama", 40, output_bias=True)
    found["errors"] = {
        "histories": told(lambda: model.recommend(HISTORIES[: 2 + rank])),
        "output_logits": told(lambda: model(batch()[0], output_logits=True)),
        "grows": told(lambda: model.add_items(["new"])),
        "resizes": told(lambda: model.resize_token_embeddings(60)),
        "compressed": told(
            lambda: RecommenderModel(
                config_of("sasrec", item_embedding={"type": "lma", "compression": 2}),
                vocab_parallel=True,
            )
        ),
        "sparse_grad": told(
            lambda: RecommenderModel(
                config_of("sasrec", loss_type="sce", loss_kwargs={"sparse_grad": True}),
                vocab_parallel=True,
            )
        ),
        "few rows": told(lambda: RecommenderModel(config_of("sasrec", 1), vocab_parallel=True)),
        "another size": told(
            lambda: RecommenderModel.from_pretrained(folder, config=other, vocab_parallel=True)
        ),
        "options": told(
            lambda: RecommenderModel.from_pretrained(folder, device_map="x", vocab_parallel=True)
        ),
    }
    return found


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return in_processes(of_processes, 2, 2, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_cut_model_answers_like_a_whole_one(of_two, backbone):
    wanted = answers(whole_model(backbone, output_bias=True))
    for found in of_two:
        got = found[backbone][0]
        assert [[r.item for r in a] for a in got["plain"]] == [
            [r.item for r in a] for a in wanted["plain"]
        ]
        assert [len(a) for a in got["limited"]] == [len(a) for a in wanted["limited"]] == [23] * 3
        for vectors, want in zip(got["vectors"], wanted["vectors"], strict=True):
            torch.testing.assert_close(torch.tensor(vectors), torch.tensor(want))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_is_that_of_a_whole_model(of_two, backbone):
    loss, gradients = step(whole_model(backbone, output_bias=True), *batch())
    of_each = [found[backbone][1] for found in of_two]
    torch.testing.assert_close(sum(each[0] for each in of_each), loss)
    for name, gradient in gradients.items():
        parts = [each[1][name] for each in of_each]
        is_cut = parts[0].shape != gradient.shape
        assert is_cut == (gradient.shape[0] == N_ITEMS + 1), name
        # Rows are averaged already; of the others each process has its own tokens' part.
        got = 2 * torch.cat(parts) if is_cut else sum(parts)
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)


def test_a_process_without_a_label_takes_part(of_two):
    loss, gradients = step(whole_model("sasrec"), *lopsided())
    wanted = ranks(whole_model("sasrec"), *lopsided())
    losses, found, found_ranks = zip(*(found["lopsided"] for found in of_two), strict=True)
    assert losses[1] == 0
    torch.testing.assert_close(losses[0], loss)
    for name, gradient in gradients.items():
        parts = [each[name] for each in found]
        is_cut = parts[0].shape != gradient.shape
        got = 2 * torch.cat(parts) if is_cut else sum(parts)
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)
    assert [len(part) for part in found_ranks[1]] == [0] * 4
    for got, want in zip(found_ranks[0], wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_no_process_ever_makes_the_whole_table(of_two):
    for found in of_two:
        assert 0 < found["largest rows"] <= 30_000
        assert found["is tied"]
        assert found["std"] == pytest.approx(0.02, rel=0.02)
    assert of_two[0]["first rows"] != of_two[1]["first rows"]


def drawn(rank):
    torch.manual_seed(0)
    model = RecommenderModel(config_of("sasrec", 9001), vocab_parallel=True)
    return model.item_head.weight.detach()


def test_new_rows_do_not_depend_on_the_number_of_processes(of_two):
    of_three = in_processes(drawn, 3)
    assert [len(rows) for rows in of_three] == [3000, 3000, 3001]
    whole = torch.cat([found["drawn"] for found in of_two])
    assert torch.equal(torch.cat(of_three), whole)
    assert len(whole.unique(dim=0)) == 9001


def test_ddp_leaves_the_rows_alone_by_all_their_names(of_two):
    names = ["backbone.embed_tokens.weight", "item_head.bias", "item_head.weight"]
    assert of_two[0]["ignored by DDP"] == names


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("histories", "Pass the same arguments in every process"),
        ("output_logits", "the output rows are cut over processes"),
        ("grows", "only a whole one grows"),
        ("resizes", "only a whole one grows"),
        ("compressed", "compressed tables are not cut"),
        ("sparse_grad", "rows that are cut have dense gradients"),
        ("few rows", "cannot be cut over 2 processes"),
        ("another size", "has shape [51, 16], and the model wants [40, 16]"),
        ("options", "does not go with device_map"),
    ],
)
def test_what_does_not_go_with_a_cut_vocabulary_is_said_in_all_processes(of_two, what, message):
    for found in of_two:
        assert message in found["errors"][what]


def test_in_one_process_nothing_is_cut(tmp_path):
    model = RecommenderModel(config_of("sasrec"), vocab_parallel=True)
    model.cut_vocabulary()
    assert model.vocab_shards is None
    model.save_pretrained(tmp_path)
    again = RecommenderModel.from_pretrained(tmp_path, vocab_parallel=True)
    assert torch.equal(again.item_head.weight, model.item_head.weight)


# ---------------------------------------------------------------------------- several groups


def of_mesh(rank, folder):
    """What two groups of two processes find; the second group has no label."""
    model = whole_model("sasrec", output_bias=True)
    model.cut_vocabulary(vocab_parallel_size=2)
    shards = model.vocab_shards
    assert (shards.world_size, shards.data_size) == (2, 2)
    assert rank == shards.rank + 2 * shards.data_rank
    own = slice(rank, rank + 1)
    found = {"answers": answers(model)}
    for name, of_all in (("batch", batch()), ("lopsided", lopsided())):
        model.zero_grad()
        found[name] = step(model, *(part[own] for part in of_all))
        found[f"{name}, ranks"] = ranks(model, *(part[own] for part in of_all))
    model.zero_grad()
    for layer in (model.item_head, model.get_input_embeddings()):
        layer.averages_gradients = False
    step(model, *(part[own] for part in batch()))
    for layer in (model.item_head, model.get_input_embeddings()):
        layer.averages_gradients = True
    found["accumulated"] = step(model, *(part[own] for part in batch()))
    model.save_pretrained(folder)
    loaded = RecommenderModel.from_pretrained(folder, vocab_parallel_size=2)
    found["loaded"] = loaded.item_head.weight.detach(), model.item_head.weight.detach()
    torch.manual_seed(rank)
    found["drawn"] = RecommenderModel(config_of("sasrec", 9001), vocab_parallel_size=2)
    found["drawn"] = found["drawn"].item_head.weight.detach()
    whole = RecommenderModel(config_of("sasrec"), vocab_parallel_size=1)
    found["whole"] = whole.vocab_shards, len(whole.item_head.weight)
    found["of three"] = told(
        lambda: RecommenderModel(config_of("sasrec"), vocab_parallel=True, vocab_parallel_size=3)
    )
    return found


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A folder, and what four processes found that saved a model there."""
    folder = tmp_path_factory.mktemp("mesh")
    return folder, in_processes(of_mesh, 4, folder)


@pytest.mark.parametrize(("name", "times"), [("batch", 1), ("lopsided", 1), ("accumulated", 2)])
def test_gradients_of_groups_are_those_of_a_whole_model_as_ddp_averages_them(mesh, name, times):
    data = lopsided() if name == "lopsided" else batch()
    loss, gradients = step(whole_model("sasrec", output_bias=True), *data)
    of_each = [found[name] for found in mesh[1]]
    torch.testing.assert_close(sum(each[0] for each in of_each), loss)
    for key, gradient in gradients.items():
        parts = [each[1][key] for each in of_each]
        if parts[0].shape == gradient.shape:
            got = sum(parts)
        else:
            for one, same in zip(parts[:2], parts[2:], strict=True):
                assert torch.equal(one, same), key
            got = 4 * torch.cat(parts[:2])
        torch.testing.assert_close(got, times * gradient, rtol=1e-5, atol=1e-6)


def test_groups_rank_and_recommend_like_a_whole_model(mesh):
    model = whole_model("sasrec", output_bias=True)
    wanted = answers(model)["plain"]
    for found in mesh[1]:
        got = found["answers"]["plain"]
        assert [[r.item for r in a] for a in got] == [[r.item for r in a] for a in wanted]
    for name, data in (("batch, ranks", batch()), ("lopsided, ranks", lopsided())):
        of_all = zip(*(found[name] for found in mesh[1]), strict=True)
        for parts, want in zip(of_all, ranks(model, *data), strict=True):
            torch.testing.assert_close(torch.cat(parts), want)


def test_one_process_of_all_writes_and_each_group_reads(mesh):
    folder, of_all = mesh
    wanted = whole_model("sasrec", output_bias=True)
    again = RecommenderModel.from_pretrained(folder)
    for name, weight in wanted.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert not list(folder.glob("*.part"))
    for found in of_all:
        assert torch.equal(*found["loaded"])


def test_groups_draw_the_same_new_rows(mesh):
    drawn = [found["drawn"] for found in mesh[1]]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert len(torch.cat(drawn[:2]).unique(dim=0)) == 9001


def test_a_group_is_a_divisor_of_all_processes(mesh):
    for found in mesh[1]:
        assert found["whole"] == (None, N_ITEMS + 1)
        assert "vocab_parallel_size=3: 4 processes" in found["of three"]


# ------------------------------------------------------------------------------------- messages


def messages(rank, n_first):
    """The messages of training, ranking and recommending, of which the first has some sequences."""
    model = whole_model("sasrec")
    model.cut_vocabulary()
    own = slice(0, n_first) if rank == 0 else slice(n_first, 4)
    ids, labels = (part[own] for part in batch())
    jobs = {
        "step": lambda: step(model, ids, labels),
        "ranks": lambda: ranks(model, ids, labels),
        "recommend": lambda: model.recommend(HISTORIES[:n_first], k=3),
        "item_vectors": lambda: model.item_vectors(["i1", "i50"][:n_first]),
    }
    found, sent = {}, record_messages()
    for name, job in jobs.items():
        job()
        found[name] = sent.copy()
        sent.clear()
    return found


def test_messages_of_a_model_depend_on_no_data_and_fit_together():
    of_each = [in_processes(messages, 2, n_first) for n_first in (1, 3)]
    for name, sent in of_each[0][0].items():
        names = [message for message, *_ in sent]
        assert 2 <= len(names) <= 20
        for of_two in of_each:
            assert [message for message, *_ in of_two[0][name]] == names
            assert_messages_fit([found[name] for found in of_two])
