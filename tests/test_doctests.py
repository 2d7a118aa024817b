"""The examples in docstrings print what they say."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec

import pytest

import hf_rece

NEED_TRL = ("hf_rece.training.finetune", "hf_rece.training.sft")
NEED_GRADIO = tuple(
    f"hf_rece.serving.{name}" for name in ("demo", "page", "planner_page", "recommender_page")
)
NEED_TRITON = ("hf_rece.ops.stream_triton", "hf_rece.ops.triton_")
MODULES = [
    info.name
    for info in pkgutil.walk_packages(hf_rece.__path__, "hf_rece.")
    if not info.name.startswith("hf_rece.metrics.ranking_at_k.")  # evaluate imports it by path
    and (find_spec("trl") or info.name not in NEED_TRL)
    and (find_spec("gradio") or info.name not in NEED_GRADIO)
    and (find_spec("triton") or not info.name.startswith(NEED_TRITON))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(bool(test.examples) for m in modules for test in finder.find(m)) > 10
