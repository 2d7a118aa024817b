import pytest
import torch
from torch.nn import functional as F

from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.losses import cross_entropy_loss, separable
from hf_rece.ops.stream import TokenStatistics

N_CLASSES = 200


@pytest.fixture
def streamed(monkeypatch):
    """The numbers of rows that the streaming kernel was given."""
    seen = []
    stream = separable.stream

    def spy(hidden, rows, *args, **kwargs):
        seen.append(rows.n_rows)
        return stream(hidden, rows, *args, **kwargs)

    monkeypatch.setattr(separable, "stream", spy)
    return seen


def make(operation="add", **sizes):
    sizes = sizes or {"compression": 4}
    return CompositionalEmbedding(N_CLASSES, 6, operation=operation, std=1.0, **sizes).double()


@pytest.mark.parametrize("operation", ["add", "concat"])
@pytest.mark.parametrize(
    "sizes", [{"compression": 3}, {"radices": (9, 5, 5)}, {"radices": (7, 40)}]
)
@pytest.mark.parametrize("excluded", [None, [0], [0, 77, 199]])
def test_equals_the_dense_loss(operation, sizes, excluded, streamed):
    table = make(operation, **sizes)
    hidden = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(1, N_CLASSES - 1, (30,))
    labels[:3], labels[labels == 77] = torch.tensor([1, 2, 198]), 78
    logits = 0.7 * hidden @ table(torch.arange(N_CLASSES)).T
    if excluded:
        logits[:, excluded] = -torch.inf
    dense = F.cross_entropy(logits, labels)
    loss = cross_entropy_loss(hidden, table, labels, excluded_ids=excluded, logit_scale=0.7)
    tensors = (hidden, *table.parameters())
    torch.testing.assert_close(loss, dense)
    for own, expected in zip(
        torch.autograd.grad(loss, tensors), torch.autograd.grad(dense, tensors), strict=True
    ):
        torch.testing.assert_close(own, expected)
    assert sorted(streamed) == sorted(table.radices)


@pytest.mark.parametrize(
    "case", ["mult", "codes", "bias", "softcap", "statistics", "hardly smaller", "all incomplete"]
)
def test_goes_class_by_class_where_it_must(case, streamed):
    table, options, codes = make(), {}, torch.cartesian_prod(torch.arange(20), torch.arange(10))
    if case == "mult":
        table = make("mult")
    if case == "codes":
        table = make("add", radices=(20, 10), codes=codes)
    if case == "bias":
        options["bias"] = torch.randn(N_CLASSES, dtype=torch.float64)
    if case == "softcap":
        options["logit_softcap"] = 3.0
    if case == "statistics":
        options["statistics"] = TokenStatistics()
    if case == "hardly smaller":
        table = make("add", radices=(200, 1))
    if case == "all incomplete":
        table = make("add", radices=(2, 150))
        options["excluded_ids"] = [0]
    hidden, labels = torch.randn(30, 6, dtype=torch.float64), torch.randint(1, N_CLASSES, (30,))
    rows = table(torch.arange(N_CLASSES)).detach()
    expected = cross_entropy_loss(hidden, rows, labels, **options)
    torch.testing.assert_close(cross_entropy_loss(hidden, table, labels, **options), expected)
    assert streamed == []


def test_ignored_tokens_and_reductions_are_as_ever():
    table, hidden = make(), torch.randn(4, 5, 6, dtype=torch.float64)
    labels = torch.randint(N_CLASSES, (4, 5))
    labels[1] = -100
    rows = table(torch.arange(N_CLASSES)).detach()
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"num_items_in_batch": 7}):
        expected = cross_entropy_loss(hidden, rows, labels, **options)
        torch.testing.assert_close(cross_entropy_loss(hidden, table, labels, **options), expected)


def test_no_tokens_give_zero_with_a_graph():
    table, hidden = make(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    loss = cross_entropy_loss(hidden, table, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad.count_nonzero() == 0
