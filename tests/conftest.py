"""Seeds, and inputs small enough for dense oracles."""

import os
from pathlib import Path

# Tests run in two processes: more threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from tests.hub_server import HubServer

# Read by Triton when it is first imported, which other packages may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long a case takes is the machine's business.
hypothesis.settings.register_profile("hf_rece", deadline=None)
hypothesis.settings.load_profile("hf_rece")

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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A small log, prepared in 7 shards: 70 users, 60 items."""
    from hf_rece.data.prepare import prepare_log
    from hf_rece.data.synthetic import generate_interactions

    folder = tmp_path_factory.mktemp("prepared")
    generate_interactions(70, 60).write_parquet(folder / "log.parquet")
    return prepare_log(folder / "log.parquet", folder / "prepared", n_shards=7)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return a Hub on this machine; huggingface_hub and transformers talk to it as `user`.

    HF_ENDPOINT is read when huggingface_hub is imported, so what it set then is patched. Other
    processes get it from the environment.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from transformers.utils import hub as of_transformers

    server = HubServer()
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_of_user",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    resolve = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(of_transformers, "_hf_api", None)
    yield server
    server.close()
