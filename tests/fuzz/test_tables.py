"""A loss over any item table is the loss over its rows, and so are the gradients of its tensors."""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from hypothesis import strategies as st

from hf_rece.embeddings.adapted_rows import ReplacedRows, ScaledRows, SideBySideRows
from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.embeddings.lma import LMAEmbedding
from hf_rece.losses import LOSSES, LossName
from hf_rece.ops.lookup import lookup
from hf_rece.ops.rows import DenseRows
from tests.fuzz.cases import cases
from tests.fuzz.problems import DTYPES, knobs_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass
class TableCase:
    """A table, and a function from its tensors, in float64, to its rows."""

    rows: Any
    naive: Any
    name: str
    knobs: dict
    options: dict
    hidden: torch.Tensor
    labels: torch.Tensor
    seed: int


def digits_of(number, radices):
    digits = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        digits.insert(0, digit)
    return digits


def compositional(draw, n_rows, width, leaf, make):
    operation = draw(st.sampled_from(["mult", "add", "concat"]))
    n_digits = draw(st.integers(2, 3))
    if operation == "concat":
        width = n_digits * max(1, width // n_digits)
    # Enough of the first digit's values, whatever the others are.
    rest = [draw(st.integers(1, 6)) for _ in range(n_digits - 1)]
    below = int(torch.tensor(rest).prod())
    radices = (-(-n_rows // below) + draw(st.integers(0, 2)), *rest)
    codes = torch.tensor([digits_of(i, radices) for i in range(n_rows)])
    given = draw(st.booleans())
    if given:
        codes = codes[torch.randperm(n_rows, generator=make)]
    table = CompositionalEmbedding(
        n_rows, width, operation=operation, radices=radices, codes=codes if given else None
    )
    table.factors = torch.nn.Parameter(leaf(*table.factors.shape))

    def naive(factors):
        of_digit = factors.split(radices)
        parts = [of_digit[j][codes[:, j]] for j in range(n_digits)]
        if operation == "concat":
            return torch.cat(parts, 1)
        stacked = torch.stack(parts)
        return stacked.sum(0) if operation == "add" else stacked.prod(0)

    return table, naive, width


def lma(draw, n_rows, width, leaf, make):
    n_keys = draw(st.integers(0, 4))
    table = LMAEmbedding(
        n_rows,
        width,
        n_cells=draw(st.integers(1, n_rows * width)),
        n_keys=n_keys,
        n_hashes=draw(st.integers(1, max(1, n_keys))),
        seed=draw(st.integers(0, 9)),
    )
    table.memory = torch.nn.Parameter(leaf(table.n_cells))
    cells = table.cells(slice(0, n_rows))
    assert 0 <= int(cells.min()) <= int(cells.max()) < table.n_cells
    return table, lambda memory: memory[cells], width


def adapted(draw, n_rows, width, leaf, make):
    rows = DenseRows(leaf(n_rows, width))
    naive = [lambda weight: weight]

    def wrap(kind):
        nonlocal rows, width
        below, n_below = naive[-1], len(rows.tensors())
        if kind == "scaled":
            rows = ScaledRows(rows, leaf(n_rows))
            naive.append(lambda scale, *rest: below(*rest) * scale[:, None])
        elif kind == "replaced":
            chosen = torch.tensor(
                sorted(draw(st.sets(st.integers(0, n_rows - 1), min_size=1, max_size=5)))
            )
            rows = ReplacedRows(rows, chosen, leaf(len(chosen), width))
            naive.append(lambda new, *rest: below(*rest).index_copy(0, chosen, new))
        else:
            more = draw(st.integers(1, 4))
            rows = SideBySideRows(rows, DenseRows(leaf(n_rows, more)))
            naive.append(lambda *all_: torch.cat([below(*all_[:n_below]), all_[-1]], 1))
            width += more

    for kind in draw(
        st.lists(st.sampled_from(["scaled", "replaced", "beside"]), min_size=1, max_size=3)
    ):
        wrap(kind)
    return rows, naive[-1], width


@st.composite
def table_cases(draw):
    n_rows, width = draw(st.integers(2, 90)), draw(st.integers(1, 12))
    seed, dtype = draw(st.integers(0, 2**20)), draw(st.sampled_from(DTYPES))
    make = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        mixed = draw(st.sampled_from([False, False, True]))
        own = draw(st.sampled_from(DTYPES)) if mixed else dtype
        values = torch.randn(shape, generator=make).to(own)
        return values.requires_grad_(draw(st.sampled_from([True, True, True, False])))

    kind = draw(st.sampled_from([compositional, lma, adapted]))
    rows, naive, width = kind(draw, n_rows, width, leaf, make)
    n_tokens = draw(st.integers(0, 30))
    hidden = torch.randn(n_tokens, width, generator=make).to(dtype).requires_grad_()
    labels = torch.randint(1, n_rows, (n_tokens,), generator=make)
    labels[torch.rand(n_tokens, generator=make) < draw(st.sampled_from([0.0, 0.5]))] = -100
    name = draw(st.sampled_from(get_args(LossName)))
    options = {"tile_bytes": draw(st.sampled_from([None, 1, 5000])), "reduction": "sum"}
    if draw(st.booleans()):
        options["excluded_ids"] = [0]
    if draw(st.booleans()):
        options["logit_scale"] = 0.5
    if draw(st.booleans()):
        options["logit_softcap"] = 5.0
    knobs = draw(knobs_of(name, n_tokens, n_rows, False))
    return TableCase(rows, naive, name, knobs, options, hidden, labels, seed)


def loss_of(case, weight, hidden):
    make = torch.Generator().manual_seed(case.seed)
    function = LOSSES[case.name].function
    return function(hidden, weight, case.labels, generator=make, **case.knobs, **case.options)


def assert_close(got, wanted, dtype, size):
    """Equal but for rounding in `dtype`, in proportion to the largest number of its kind."""
    assert bool(((got.double() - wanted.double()).abs() <= TOLERANCE[dtype] * (1 + size)).all())


@cases(60, table_cases())
def test_a_loss_over_a_table_is_the_loss_over_its_rows(case):
    tensors = case.rows.tensors()
    copies = [t.detach().double().requires_grad_() for t in tensors]
    whole = case.naive(*copies)
    everything = case.rows.rows(slice(0, case.rows.n_rows)).detach()
    narrowest = max((t.dtype for t in (*tensors, case.hidden)), key=TOLERANCE.get)
    assert_close(everything, whole, narrowest, float(whole.detach().abs().max()))
    some = torch.randint(case.rows.n_rows, (3, 2), generator=torch.Generator().manual_seed(1))
    assert torch.equal(lookup(case.rows, some).detach(), everything[some])

    # The table's own rows, so that every hash and top-k sees the same numbers.
    wide = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    dense, states = everything.to(wide).requires_grad_(), case.hidden.detach().requires_grad_()
    loss, wanted = loss_of(case, case.rows, case.hidden), loss_of(case, dense, states)
    rounding = torch.float32 if wide == torch.float32 else torch.float64
    if case.name == "cross_entropy" and narrowest != rounding:
        # Where rows are sums of independent parts, the exact loss adds logits: no row is rounded.
        unrounded = loss_of(case, whole.detach().to(wide), states).detach()
        wanted_loss = min(
            wanted.detach(), unrounded, key=lambda value: abs(float(value - loss.detach()))
        )
    else:
        wanted_loss = wanted.detach()
    assert_close(loss, wanted_loss, rounding, float(wanted_loss.abs()))
    of_hidden, of_rows = torch.autograd.grad(wanted, (states, dense))
    trained = [t for t in tensors if t.requires_grad]
    got = torch.autograd.grad(loss, [case.hidden, *trained])
    expected = torch.autograd.grad((whole * of_rows.double()).sum(), copies)
    expected = [e for e, t in zip(expected, tensors, strict=True) if t.requires_grad]
    for own, dense_grad in zip(got, [of_hidden, *expected], strict=True):
        assert_close(
            own, dense_grad, narrowest, float(dense_grad.abs().max()) if own.numel() else 0
        )
