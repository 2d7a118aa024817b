"""Recommenders whose item table is compressed."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, GPT2Config, LlamaConfig

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig
from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import TableHead
from tests.checkpointing import enable_checkpointing
from tests.processes import findings_of_two_processes

TABLES = {
    "quotient and remainder": {"type": "compositional", "compression": 2, "codes": "id"},
    "codes": {"type": "compositional", "radices": [5, 5, 5], "operation": "add"},
    "lma": {"type": "lma", "compression": 2},
    "hashing": {"type": "lma", "compression": 2, "n_keys": 0},
}
every_table = pytest.mark.parametrize("table", TABLES)
BACKBONES = {
    "sasrec": lambda: SASRecConfig(hidden_size=16, max_position_embeddings=20, dropout=0.0),
    "gpt2": lambda: GPT2Config(
        n_embd=16, n_head=2, n_layer=2, n_positions=20, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    ),
    "llama": lambda: LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ),
}


def make(table, backbone="sasrec", vocab_size=60, **knobs):
    config = RecommenderConfig(
        backbone=BACKBONES[backbone](), vocab_size=vocab_size, item_embedding=TABLES[table], **knobs
    )
    return RecommenderModel(config)


def train_part(n_items=59):
    histories = [torch.randint(1, n_items + 1, (9,)).tolist() for _ in range(80)]
    return Dataset.from_dict({"item_ids": histories})


def batch(vocab_size=60):
    ids, labels = torch.randint(1, vocab_size, (2, 3, 7)).unbind(0)
    return {"input_ids": ids, "labels": labels}


@every_table
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_dense_ones(table, backbone, tied):
    model = make(table, backbone, tie_word_embeddings=tied, output_bias=True).train()
    model.learn_item_tables(train_part())
    inputs = batch()
    own = model(**inputs).loss
    logits = model.item_head(model.backbone(input_ids=inputs["input_ids"]).last_hidden_state)
    logits[..., 0] = -torch.inf
    dense = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(own, dense)
    parameters = tuple(model.parameters())
    for left, right in zip(
        torch.autograd.grad(own, parameters), torch.autograd.grad(dense, parameters), strict=True
    ):
        torch.testing.assert_close(left, right, atol=2e-6, rtol=1e-4)


@every_table
@pytest.mark.parametrize("tied", [True, False])
def test_reloads_bit_for_bit(table, tied, tmp_path):
    model = make(table, "llama", tie_word_embeddings=tied, output_bias=True).eval()
    model.learn_item_tables(train_part())
    model.save_pretrained(tmp_path)
    again, report = RecommenderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = batch()
    for loaded in (again, AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded.eval()(**inputs).loss, model(**inputs).loss)
    table_is_shared = again.item_head.rows is again.get_input_embeddings()
    assert table_is_shared == tied


@every_table
def test_other_dtypes_leave_codes_and_signatures_alone(table, tmp_path):
    model = make(table)
    model.learn_item_tables(train_part())
    model.save_pretrained(tmp_path)
    again = RecommenderModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, buffer in model.get_input_embeddings().named_buffers():
        assert torch.equal(again.get_input_embeddings().get_buffer(name), buffer)
    assert torch.isfinite(again(**batch()).loss)


@every_table
@pytest.mark.parametrize("loss_type", ["rece", "sce", "stratified", "sampled_softmax", "gbce"])
def test_every_loss_reaches_every_parameter(table, loss_type):
    model = make(table, loss_type=loss_type)
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("loss_type", ["cross_entropy", "rece", "stratified"])
@pytest.mark.parametrize(
    "item_embedding",
    [
        {"type": "compositional", "compression": 16, "operation": "mult", "codes": "id"},
        {"type": "compositional", "compression": 16, "codes": "given"},
        {"type": "lma", "compression": 16},
    ],
    ids=["quotient and remainder", "codes", "lma"],
)
def test_the_whole_table_is_never_composed(loss_type, item_embedding):
    n_classes, width = 200_000, 32
    with LargestTensor() as largest:
        config = RecommenderConfig(
            backbone=SASRecConfig(hidden_size=width, num_hidden_layers=1),
            vocab_size=n_classes,
            item_embedding=item_embedding,
            loss_type=loss_type,
        )
        model = RecommenderModel(config)
        inputs = batch(n_classes)
        model(**inputs).loss.backward()
        model.eval()(**inputs, rank_k=5)
    assert largest.numel < n_classes * width / 2


@every_table
def test_recommends_in_the_users_ids(table):
    model = make(table)
    model.tokenizer = ItemTokenizer(items=[f"item {i}" for i in range(59)])
    answers = model.recommend([["item 3", "item 4"], ["item 5"]], k=57)
    assert len({found.item for found in answers[0]}) == 57
    assert not {"item 3", "item 4"} & {found.item for found in answers[0]}


@every_table
def test_gradients_are_the_same_with_checkpointing(table):
    model, inputs = make(table).train(), batch()
    model(**inputs).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    enable_checkpointing(model)
    model(**inputs).loss.backward()
    for left, right in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left)


def test_the_tied_table_is_stored_once(tmp_path):
    make("lma").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert [name for name in file.keys() if "memory" in name] == [  # noqa: SIM118
            "backbone.embed_tokens.memory"
        ]


def test_items_of_the_same_users_share_memory_after_learning():
    model = make("lma")
    histories = [[1, 2, 3 + user % 50] for user in range(100)]
    model.learn_item_tables(Dataset.from_dict({"item_ids": histories}))
    cells = model.get_input_embeddings().cells(torch.tensor([1, 2, 5]))
    # The same users, but for one key that keeps the two apart.
    assert float((cells[0] == cells[1]).float().mean()) > 0.4
    assert float((cells[0] == cells[2]).float().mean()) < 0.4


def test_output_of_its_own_learns_codes_too():
    model = make("codes", tie_word_embeddings=False)
    model.learn_item_tables(train_part(), seed=3)
    assert torch.equal(model.item_head.rows.codes, model.get_input_embeddings().codes)


def test_dense_logits_come_on_request():
    model = make("lma", output_bias=True).eval()
    logits = model(input_ids=batch()["input_ids"], output_logits=True).logits
    assert logits.shape == (3, 7, 60)


@pytest.mark.parametrize("copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_tied_to_its_own_table(copy):
    model = make("codes")
    twin = copy(model)
    assert twin.item_head.rows is twin.get_input_embeddings()
    assert twin.item_head.rows is not model.get_input_embeddings()


def test_a_new_input_table_is_the_output_too():
    model, table = make("codes"), LMAEmbedding(60, 16, compression=2)
    model.set_input_embeddings(table)
    assert model.item_head.rows is table


def test_moving_to_another_dtype_moves_the_tied_table():
    model = make("lma").bfloat16()
    assert model.item_head.rows.memory.dtype == torch.bfloat16
    assert torch.isfinite(model(**batch()).loss)


def test_a_head_needs_a_table_of_rows():
    with pytest.raises(TypeError, match="Linear has no output rows"):
        TableHead(torch.nn.Linear(3, 3), bias=True)


@pytest.mark.parametrize(
    ("item_embedding", "message"),
    [
        ({"type": "hash"}, "names no table.*dense, compositional, lma"),
        ({"compression": 4}, "names no table"),
        ({"type": "lma", "compresion": 4}, "lma has no setting compresion.*compression, n_cells"),
        ({"type": "dense", "compression": 4}, "dense has no setting compression"),
        ({"type": "compositional", "codes": "random"}, "codes=.random."),
    ],
)
def test_unknown_tables_fail_when_the_configuration_is_made(item_embedding, message):
    with pytest.raises(ArgumentError, match=message):
        RecommenderConfig(item_embedding=item_embedding)


@pytest.mark.parametrize(
    ("item_embedding", "message"),
    [
        ({"type": "lma"}, "compression=None"),
        ({"type": "compositional", "compression": 1000}, "compression=1000.*60 ids"),
        ({"type": "compositional", "compression": 2, "codes": "random"}, "codes='random'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(item_embedding, message):
    with pytest.raises(ArgumentError, match=message):
        RecommenderModel(RecommenderConfig(vocab_size=60, item_embedding=item_embedding))


@pytest.mark.parametrize("item_embedding", [TABLES["lma"], TABLES["codes"]])
def test_a_log_with_more_items_than_the_table_is_refused(item_embedding):
    config = RecommenderConfig(vocab_size=60, item_embedding=item_embedding)
    with pytest.raises(ArgumentError, match="60 rows"):
        RecommenderModel(config).learn_item_tables(train_part(n_items=90))


@every_table
@pytest.mark.parametrize("tied", [True, False])
def test_tables_start_as_wide_as_the_configuration_says(table, tied):
    torch.manual_seed(0)
    backbone = SASRecConfig(hidden_size=16, initializer_range=0.5)
    config = RecommenderConfig(
        backbone=backbone, vocab_size=2000, tie_word_embeddings=tied,
        item_embedding={**TABLES[table], **({"radices": [13, 13, 13]} if table == "codes" else {})},
    )  # fmt: skip
    model = RecommenderModel(config)
    ids = torch.arange(2000)
    for rows in (model.get_input_embeddings()(ids), model.item_head.rows(ids)):
        assert float(rows.detach().std()) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("before", [None, *TABLES])
@pytest.mark.parametrize("after", ["codes", "lma"])
def test_what_a_checkpoint_does_not_fill_is_as_new(before, after, tmp_path):
    item_embedding = None if before is None else TABLES[before]
    backbone = BACKBONES["sasrec"]()
    config = RecommenderConfig(backbone=backbone, vocab_size=50, item_embedding=item_embedding)
    RecommenderModel(config).save_pretrained(tmp_path)
    wanted = {"type": "compositional", "radices": [6, 6, 6], "operation": "add"}
    wanted = wanted if after == "codes" else {"type": "lma", "compression": 3}
    model = RecommenderModel.from_pretrained(
        tmp_path, vocab_size=60, item_embedding=wanted, ignore_mismatched_sizes=True
    )
    new = RecommenderModel(model.config)
    for own, expected in zip(model.buffers(), new.buffers(), strict=True):
        assert torch.equal(own, expected)
    rows = model.get_input_embeddings()(torch.arange(60)).detach()
    assert 0.01 < float(rows.std()) < 0.03


def test_a_replica_reads_a_table_of_its_own():
    model = make("lma").eval()
    replica, inputs = make("lma").eval(), batch()
    replica.load_state_dict(model.state_dict())
    expected = replica(**inputs).loss
    replica.item_head.tied_table = (make("lma").get_input_embeddings(),)  # as copied from elsewhere
    torch.testing.assert_close(replica(**inputs).loss, expected)


def findings(folder, n_processes):
    """Codes and gradients of each table after a step on this process's part of the data."""
    rank = 0
    if n_processes > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        assert torch.distributed.get_world_size() == n_processes
    found = {}
    for table in ("codes", "lma"):
        torch.manual_seed(0)
        model = make(table).train()
        torch.manual_seed(rank)
        model.learn_item_tables(train_part())
        table_sum = sum(float(buffer.double().sum()) for buffer in model.buffers())
        wrapped = torch.nn.parallel.DistributedDataParallel(model) if n_processes > 1 else model
        wrapped(**batch()).loss.backward()
        norm = sum(float(p.grad.double().square().sum()) for p in model.parameters())
        found[table] = [table_sum, norm]
    return found


def test_two_processes_agree_about_codes_and_gradients(tmp_path):
    first, second = findings_of_two_processes("tests.models.test_item_tables", tmp_path)
    assert first == second
    one = findings(tmp_path, 1)
    assert {name: values[0] for name, values in first.items()} == {
        name: values[0] for name, values in one.items()
    }
