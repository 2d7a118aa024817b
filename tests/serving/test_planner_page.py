"""What the planner's page shows, without a browser."""

import re

import pytest

pytest.importorskip("gradio")

from hypothesis import given
from hypothesis import strategies as st

from hf_rece import plan_losses
from hf_rece.losses.planning import human_bytes
from hf_rece.serving.planner_page import human_seconds, matmul_flops_per_second, show_plan

SPEEDS = {"cpu": 1e9}


def shown(**changed):
    shape = {"classes": 100_000, "tokens": 4096, "width": 64, "dtype": "float32", "device": "cpu"}
    return show_plan(SPEEDS, **{**shape, "has_budget": False, "budget": 64, **changed})


def values(page):
    """The amounts of a page, row by row: memory, time or operations."""
    amounts = re.findall(r'<td><span class="number">(.*?)</span>', page)
    return list(zip(amounts[::2], amounts[1::2], strict=True))


def test_every_loss_has_the_bytes_of_plan_losses_and_its_operations_as_time():
    plans = plan_losses(4096, 100_000, 64)
    assert values(shown()) == [
        (human_bytes(plan.bytes), human_seconds(plan.flops / 1e9)) for plan in plans
    ]
    assert re.findall(r'class="wide">(\w+)<', shown()) == [plan.loss for plan in plans]


def test_the_speed_that_was_measured_is_told():
    assert "operations ÷ 1.00 GFLOP/s" in shown()
    assert "estimate" in shown()


def test_a_device_that_is_not_there_shows_operations():
    page = shown(device="cuda")
    assert values(page)[0][1] == "157 GFLOP"
    assert "no cuda to measure" in page
    assert "GFLOP/s" not in page


def test_type_and_budget_are_those_of_plan_losses():
    plans = plan_losses(4096, 100_000, 64, dtype="bfloat16", memory_budget="200MiB")
    page = shown(dtype="bfloat16", has_budget=True, budget=200)
    assert [memory for memory, _ in values(page)] == [human_bytes(plan.bytes) for plan in plans]
    assert f"n_hard={plans[4].knobs['n_hard']}" in page


def test_a_budget_that_is_too_small_shows_the_errors_message():
    page = shown(has_budget=True, budget=2)
    assert "memory_budget=&#39;2MiB&#39;: 4096 tokens" in page
    assert "need at least" in page
    assert "<table" not in page


def test_a_budget_that_is_not_asked_for_does_not_count():
    assert shown(budget=None) == shown()


@pytest.mark.parametrize("name", ["classes", "tokens", "width"])
@pytest.mark.parametrize("value", [None, 0, -3, 1.5, 1e30, 10**400, True, "<b>", [1]])
def test_what_is_no_number_of_things_shows_a_message(name, value):
    page = shown(**{name: value})
    assert f"{name}=" in page
    assert "Type a whole number from 1" in page
    assert "<b>" not in page


@given(classes=st.integers(1, 10**12), tokens=st.integers(1, 10**12), width=st.integers(1, 10**12))
def test_every_dot_is_on_its_axis(classes, tokens, width):
    page = shown(classes=classes, tokens=tokens, width=width)
    places = [float(place) for place in re.findall(r'[bi] style="left: (.*?)%"', page)]
    assert len(places) >= 2 * 8 * 3
    assert min(places) == 0
    assert max(places) == 100
    assert page.count("<i ") <= 2 * 8 * 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250 ms"), (3e-7, "300 ns"), (1, "1 s"), (12_345, "12,345 s"), (1e-12, "0.001 ns")],
)
def test_seconds_are_written_in_the_largest_unit_below(seconds, text):
    assert human_seconds(seconds) == text


def test_the_speed_of_this_machine_is_that_of_a_machine():
    assert 1e7 < matmul_flops_per_second("cpu") < 1e15
