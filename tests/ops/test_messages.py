"""Messages arrive, whatever their type and wherever they lie."""

import ast
from pathlib import Path

import pytest
import torch
from torch import distributed

from hf_rece.ops import messages
from tests.processes import in_processes

TYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool]


def sent(rank, elsewhere):
    """Return what each message brings to two processes, of which the second differs by one."""
    if elsewhere:  # to torch, cpu:0 is not where tensors of cpu lie: they are copied there and back
        messages.device_for = lambda group, device: torch.device("cpu", 0)
    found = {}
    for dtype in TYPES:
        own = torch.arange(6).view(3, 2).add(rank).to(dtype)
        codes = own.clone()
        messages.take_from_first(codes, None)
        arrived = torch.zeros_like(own)
        if rank:
            messages.send(own, 0, None)
        else:
            messages.receive(arrived, 1, None)
        exchanged = messages.exchange(own, [1, 2], [1 + rank] * 2, None)
        gathered = messages.gather_all(own, 2, None)
        found[str(dtype)] = codes, arrived, exchanged, gathered
    total = torch.tensor([rank, 5 - rank])
    messages.wait_for_all(None)
    found["sum"] = messages.reduce_all(total.clone(), "sum", None)
    found["max"] = messages.reduce_all(total, "max", None)
    assert found["max"] is total
    seed = torch.tensor(rank)
    found["seed"] = messages.take_from_first(seed, None)
    return found


@pytest.mark.parametrize("elsewhere", [False, True])
def test_messages_arrive_wherever_they_lie(elsewhere):
    of_both = in_processes(sent, 2, elsewhere)
    for rank, found in enumerate(of_both):
        for dtype in TYPES:
            codes, arrived, exchanged, gathered = found[str(dtype)]
            first, second = (torch.arange(6).view(3, 2).add(r).to(dtype) for r in (0, 1))
            assert torch.equal(codes, first)
            assert torch.equal(arrived, torch.zeros_like(first) if rank else second)
            part = slice(1, 3) if rank else slice(0, 1)
            assert torch.equal(exchanged, torch.cat([first[part], second[part]]))
            assert torch.equal(gathered, torch.stack([first, second]))
        assert found["sum"].tolist() == [1, 9]
        assert found["max"].tolist() == [1, 5]
        assert found["seed"] == 0


@pytest.mark.parametrize(
    ("backends", "lies_on", "wanted"),
    [
        ("cuda:nccl", "cpu", "cuda:3"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:gloo", "cuda:1", "cpu"),
    ],
)
def test_a_group_sends_from_where_its_backend_can(backends, lies_on, wanted, monkeypatch):
    monkeypatch.setattr(distributed, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert messages.device_for(object(), torch.device(lies_on)) == torch.device(wanted)


def test_no_other_file_sends():
    names = {
        "all_reduce",
        "all_gather",
        "all_to_all_single",
        "broadcast",
        "send",
        "recv",
        "barrier",
    }
    package = Path(messages.__file__).parents[1]
    for path in package.rglob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        sending = {
            call.attr
            for call in calls
            if isinstance(call, ast.Attribute)
            and ast.unparse(call.value).endswith("distributed")
            and call.attr in names
        }
        assert bool(sending) == (path.name == "messages.py"), path
