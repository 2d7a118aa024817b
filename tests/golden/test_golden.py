"""RECE and SCE reproduce what the papers' own programs print."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_rece.losses.rece import rece_loss
from hf_rece.losses.sce import sce_loss

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
CASES = sorted(GOLDEN.glob("*.safetensors"))

pytestmark = pytest.mark.skipif(not CASES, reason="golden values are not beside the checkout")


def load(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(  # noqa: SIM118
            file.metadata()["case"]
        )


def loss_of(case, values):
    hidden = values["hidden"].clone().requires_grad_()
    weight = values["weight"].clone().requires_grad_()
    common = {"directions": values["directions"], "excluded_ids": case["excluded_ids"]}
    if case["kind"] == "rece":
        loss = rece_loss(
            hidden,
            weight,
            values["labels"],
            buckets_per_chunk=case["buckets_per_chunk"],
            n_extra_chunks=case["n_extra_chunks"],
            **common,
        )
    else:
        loss = sce_loss(
            hidden,
            weight,
            values["labels"],
            bucket_size_x=case["bucket_size_x"],
            bucket_size_y=case["bucket_size_y"],
            **common,
        )
    loss.backward()
    return loss, hidden.grad, weight.grad


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_loss_and_gradients_equal_the_published_programs(path):
    values, case = load(path)
    loss, grad_hidden, grad_weight = loss_of(case, values)
    torch.testing.assert_close(loss.reshape(1), values["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(grad_hidden, values["grad_hidden"], atol=1e-5, rtol=0)
    torch.testing.assert_close(grad_weight, values["grad_weight"], atol=1e-5, rtol=0)
