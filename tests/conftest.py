"""Seeds, and inputs small enough for dense oracles."""

import os
from pathlib import Path

import pytest
import torch

# Read by Triton when it is first imported, which other packages may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip("the shared data is not beside the checkout")
    return SHARED


@pytest.fixture
def inputs():
    """Return make(n_tokens, n_classes, width) -> hidden, weight, labels in float64."""

    def make(n_tokens=24, n_classes=40, width=6, dtype=torch.float64):
        hidden = torch.randn(n_tokens, width, dtype=dtype).requires_grad_()
        weight = torch.randn(n_classes, width, dtype=dtype).requires_grad_()
        return hidden, weight, torch.randint(n_classes, (n_tokens,))

    return make
