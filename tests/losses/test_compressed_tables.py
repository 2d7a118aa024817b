"""Every loss over a compressed table is the loss over its rows."""

import inspect

import pytest
import torch

from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.losses import LOSSES, build_loss
from hf_rece.ops.rows import mixed_radix_digits
from hf_rece.ops.topk import label_rank, streamed_topk

C, D = 300, 9
CODES = torch.stack(mixed_radix_digits(torch.randperm(343)[:C], (7, 7, 7)), dim=1)
TABLES = {
    "mult": lambda: CompositionalEmbedding(C, D, compression=4, std=1.0),
    "add": lambda: CompositionalEmbedding(C, D, operation="add", compression=4, std=1.0),
    "codes": lambda: CompositionalEmbedding(
        C, D, operation="concat", radices=(7, 7, 7), codes=CODES, std=1.0
    ),
    "lma": lambda: LMAEmbedding(C, D, compression=4, n_keys=4, std=1.0),
    "hashing": lambda: LMAEmbedding(C, D, compression=4, std=1.0),
}
every_table = pytest.mark.parametrize("name", TABLES)


@every_table
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients(name, loss_type):
    table = TABLES[name]().double()
    rows = table(torch.arange(C))
    hidden = torch.randn(40, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(1, C, (40,))
    parameters = inspect.signature(LOSSES[loss_type].function).parameters
    knobs = {"n_negatives": 50} if "n_negatives" in parameters else {}
    loss = build_loss(loss_type, excluded_ids=[0], tile_bytes=20_000, **knobs)
    tensors = (hidden, *table.parameters())
    results = []
    for weight in (table, rows):
        generator = torch.Generator().manual_seed(3)
        value = loss(hidden, weight, labels, generator=generator)
        results.append((value.detach(), *torch.autograd.grad(value, tensors, retain_graph=True)))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-9)


@every_table
def test_ranks_and_best_items(name):
    table = TABLES[name]()
    rows, hidden = table(torch.arange(C)).detach(), torch.randn(20, D)
    labels = torch.randint(C, (20,))
    scores, ids = streamed_topk(hidden, table, 5)
    expected = (hidden @ rows.T).topk(5)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(ids, expected.indices)
    assert torch.equal(label_rank(hidden, table, labels)[0], label_rank(hidden, rows, labels)[0])


@every_table
def test_half_precision_tables_accumulate_in_single(name):
    table = TABLES[name]().bfloat16()
    hidden = torch.randn(40, D).bfloat16().requires_grad_()
    labels = torch.randint(1, C, (40,))
    loss = build_loss("cross_entropy")(hidden, table, labels)
    rows = table(torch.arange(C)).detach()
    torch.testing.assert_close(
        loss, build_loss("cross_entropy")(hidden, rows, labels), rtol=2e-2, atol=0
    )
    loss.backward()
    assert {p.grad.dtype for p in table.parameters()} == {torch.bfloat16}
