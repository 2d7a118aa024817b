import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.embeddings.digits import code_numbers, own_codes
from hf_rece.errors import ArgumentError
from hf_rece.ops.rows import OutputRows, mixed_radix_digits

OPERATIONS = ("mult", "add", "concat")
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


def composed(table):
    """Every row, one at a time, from the factors alone."""
    rows = []
    for number in range(table.num_embeddings):
        if table.codes is None:
            digits, rest = [], number
            for radix in reversed(table.radices):
                digits.insert(0, rest % radix)
                rest //= radix
        else:
            digits = table.codes[number].tolist()
        factors = table.factors.split(table.radices)
        parts = [factor[d] for factor, d in zip(factors, digits, strict=True)]
        row = parts[0]
        for part in parts[1:]:
            row = {"mult": lambda a, b: a * b, "add": lambda a, b: a + b}.get(
                table.operation, lambda a, b: torch.cat([a, b])
            )(row, part)
        rows.append(row)
    return torch.stack(rows)


def tables(operation):
    yield CompositionalEmbedding(60, 6, operation=operation, compression=3, std=1.0)
    yield CompositionalEmbedding(60, 6, operation=operation, radices=(3, 4, 5), std=1.0)
    codes = torch.cartesian_prod(torch.arange(8), torch.arange(8))[torch.randperm(64)[:60]]
    yield CompositionalEmbedding(60, 6, operation=operation, radices=(8, 8), codes=codes, std=1.0)


@every_operation
def test_rows_are_those_of_a_dense_oracle(operation):
    for table in tables(operation):
        ids = torch.tensor([[0, 59, 3], [7, 7, 31]])
        expected = composed(table)
        torch.testing.assert_close(table(ids), expected[ids], rtol=0, atol=1e-6)
        torch.testing.assert_close(table.rows(slice(5, 50)), expected[5:50], rtol=0, atol=1e-6)


@every_operation
def test_gradients_of_a_lookup_are_those_of_a_dense_oracle(operation):
    for table in tables(operation):
        ids = torch.tensor([0, 59, 3, 7, 7, 31])
        direction = torch.randn(6, 6)
        own = torch.autograd.grad((table(ids) * direction).sum(), table.tensors())
        dense = torch.autograd.grad((composed(table)[ids] * direction).sum(), table.tensors())
        for left, right in zip(own, dense, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(radices=st.lists(st.integers(1, 7), min_size=2, max_size=4))
def test_every_id_has_a_code_of_its_own(radices):
    n_rows = math.prod(radices)
    codes = torch.stack(mixed_radix_digits(torch.arange(n_rows), radices), dim=1)
    assert len(torch.unique(codes, dim=0)) == n_rows
    assert bool((codes >= 0).all())
    assert bool((codes < torch.tensor(radices)).all())


@settings(max_examples=60, deadline=None)
@given(n_rows=st.integers(1024, 10**7), compression=st.floats(2, 8))
def test_quotient_and_remainder_keep_to_the_compression(n_rows, compression):
    table = CompositionalEmbedding(n_rows, 2, operation="add", compression=compression)
    assert sum(table.radices) <= n_rows / compression
    assert math.prod(table.radices) >= n_rows


@every_operation
@pytest.mark.parametrize("codes", [None, "given"])
def test_parameters_are_as_few_as_asked(operation, codes):
    if codes:
        codes = torch.stack(mixed_radix_digits(torch.arange(4000), (10, 10, 10, 10)), dim=1)
    table = CompositionalEmbedding(4000, 64, operation=operation, compression=16, codes=codes)
    parameters = sum(p.numel() for p in table.parameters())
    assert 0.95 < 4000 * 64 / 16 / parameters < 1.15


@every_operation
def test_rows_start_with_the_standard_deviation_asked_for(operation):
    table = CompositionalEmbedding(9000, 64, operation=operation, radices=(100, 90), std=0.02)
    rows = table.rows(slice(0, 9000)).detach()
    assert float(rows.std()) == pytest.approx(0.02, rel=0.1)
    assert abs(float(rows.mean())) < 0.002


def test_rows_start_in_unlike_directions():
    table = CompositionalEmbedding(9000, 64, operation="mult", radices=(100, 90))
    rows = torch.nn.functional.normalize(table.rows(slice(0, 9000)).detach(), dim=1)
    assert abs(float((rows[:1000] @ rows[-1000:].T).mean())) < 0.05


def test_codes_take_the_fewest_bytes():
    codes = torch.stack(mixed_radix_digits(torch.arange(600), (300, 2)), dim=1)
    assert CompositionalEmbedding(600, 4, radices=(300, 2), codes=codes).codes.dtype == torch.int16
    codes = torch.stack(mixed_radix_digits(torch.arange(600), (65537, 1)), dim=1)
    table = CompositionalEmbedding(600, 4, radices=(65537, 1), codes=codes)
    assert table.codes.dtype == torch.int32
    codes = torch.stack(mixed_radix_digits(torch.arange(600), (256, 3)), dim=1)
    assert CompositionalEmbedding(600, 4, radices=(256, 3), codes=codes).codes.dtype == torch.uint8


def test_digits_of_two_bytes_have_no_sign():
    codes = torch.tensor([[0, 1], [40_000, 0], [65_535, 2]])
    table = CompositionalEmbedding(3, 4, radices=(65_536, 3), operation="add", codes=codes)
    rows = table.factors[codes[:, 0]] + table.factors[65_536 + codes[:, 1]]
    assert torch.equal(table(torch.arange(3)), rows)
    table.set_codes(codes.flip(0))
    assert torch.equal(table(torch.arange(3)), rows.flip(0))


def test_codes_too_many_for_one_integer_are_still_told_apart():
    radices = (3000,) * 8
    codes = torch.randint(3000, (500, 8))
    codes[-1] = codes[0]
    assert len(torch.unique(code_numbers(codes, radices))) == 499


def test_is_a_table_of_output_rows():
    assert isinstance(CompositionalEmbedding(60, 6, compression=3), OutputRows)


def test_a_frozen_table_gets_no_gradient():
    table = CompositionalEmbedding(60, 6, compression=3).requires_grad_(False)
    assert not table(torch.tensor([1, 2])).requires_grad
    table.add_grad((None,), torch.tensor([1, 2]), torch.ones(2, 6))


def test_ids_beyond_the_table_are_refused():
    with pytest.raises(ArgumentError, match=r"input_ids=\(3, 60\).*the table has 60 rows"):
        CompositionalEmbedding(60, 6, compression=3)(torch.tensor([3, 60]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation": "xor", "compression": 2}, "operation='xor'.*mult, add or concat"),
        ({}, "compression=None.*exactly one"),
        ({"compression": 2, "radices": (8, 8)}, "compression=2.*exactly one"),
        ({"radices": (7, 8)}, r"radices=\(7, 8\).*cannot number 60 ids"),
        ({"radices": (60,)}, "two or more"),
        ({"compression": 30}, "compression=30: 2 rows of factors cannot number 60 ids"),
        ({"compression": 0.5}, "compression=0.5"),
        ({"radices": (8, 8), "operation": "concat"}, "2 factors cannot share 3 columns"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        CompositionalEmbedding(60, 3, **arguments)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(60, 2, dtype=torch.long), r"codes=\[0, 0\]: ids \[0, 1, 2\] have this code"),
        (torch.arange(120).view(60, 2), "largest digit 0, which has 8 values"),
        (torch.zeros(59, 2, dtype=torch.long), "there are 60 ids"),
        (torch.zeros(60, 2), "there are 60 ids"),
        (torch.zeros(60, 3, dtype=torch.long), "there are 2 radices"),
    ],
)
def test_bad_codes_are_refused(codes, message):
    with pytest.raises(ArgumentError, match=message):
        CompositionalEmbedding(60, 8, radices=(8, 8), codes=codes)


def test_codes_to_come_start_as_the_digits_of_the_ids(monkeypatch):
    monkeypatch.setattr("hf_rece.embeddings.digits._IDS_AT_ONCE", 7)
    table = CompositionalEmbedding(60, 8, radices=(5, 3, 4), n_codes=3)
    own = CompositionalEmbedding(60, 8, radices=(5, 3, 4))
    own.load_state_dict({"factors": table.factors})
    assert torch.equal(table.rows(slice(0, 60)), own.rows(slice(0, 60)))
    assert table.codes.dtype == torch.uint8


def test_codes_are_replaced_only_where_there_are_some():
    codes = torch.stack(mixed_radix_digits(torch.arange(60), (8, 8)), dim=1)
    table = CompositionalEmbedding(60, 8, radices=(8, 8), codes=codes)
    table.set_codes(codes.flip(0))
    assert table.codes[0].tolist() == [7, 3]
    with pytest.raises(ArgumentError, match="repeat"):
        table.set_codes(torch.zeros_like(codes))
    assert table.codes[0].tolist() == [7, 3]
    with pytest.raises(ArgumentError, match="there are 2 radices"):
        table.set_codes(torch.arange(180).view(60, 3))
    with pytest.raises(ArgumentError, match="computes its codes"):
        CompositionalEmbedding(60, 8, radices=(8, 8)).set_codes(codes)


def test_codes_of_one_table_serve_another():
    radices = (40_000, 2)
    one = CompositionalEmbedding(
        50_000, 4, operation="add", radices=radices, codes=own_codes(50_000, radices)
    )
    assert one.codes.dtype == torch.int16
    other = CompositionalEmbedding(50_000, 4, operation="add", radices=radices, codes=one.codes)
    assert torch.equal(other.codes, one.codes)
    other.set_codes(one.codes)
    assert torch.equal(other.codes, one.codes)
