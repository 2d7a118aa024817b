"""`hf-rece demo`: what is served, where, and what is not."""

import re
import runpy
import socket
import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio")

import gradio

from hf_rece import RecommenderConfig, RecommenderModel, cli
from hf_rece.errors import ArgumentError, DataError
from hf_rece.serving import demo as room
from hf_rece.serving.demo import build_demo, check_address
from tests.serving.shop import shop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop().save_pretrained(folder)
    (folder / "titles.csv").write_text("item_id,title\ntool 1,Hammer\n")
    return folder


@pytest.fixture
def launched(monkeypatch):
    """What Blocks.launch was called with."""
    calls = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **how: calls.append((self, how)))
    return calls


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def said(demo):
    return str([block.get_config() for block in demo.blocks.values()])


def test_nothing_is_sent_home_and_nothing_is_shared(saved, launched, monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "True")
    port = free_port()
    cli.demo(["--model_name_or_path", str(saved), "--port", str(port)])
    ((demo, how),) = launched
    assert how["share"] is False
    assert how["run_history"] is False
    assert (how["server_name"], how["server_port"]) == ("127.0.0.1", port)
    assert not {"allowed_paths", "auth"} & set(how)
    assert demo.analytics_enabled is False


def test_titles_are_shown(saved, launched):
    words = ["--item_titles", str(saved / "titles.csv"), "--port", str(free_port())]
    cli.demo(["--model_name_or_path", str(saved), *words])
    ((demo, _),) = launched
    assert "Hammer (tool 1)" in said(demo)


def test_without_a_model_there_is_the_planner_alone(launched):
    cli.demo(["--port", str(free_port())])
    ((demo, _),) = launched
    assert "cross_entropy" in said(demo)
    assert "Find one of" not in said(demo)


def test_the_catalogue_is_not_sent_to_the_browser():
    model = RecommenderModel(RecommenderConfig(backbone={"hidden_size": 8}, vocab_size=50_001))
    model.tokenizer = type(shop().tokenizer)(items=list(range(50_000)))
    assert len(said(build_demo(model))) < 200_000


def test_a_model_without_items_is_named():
    with pytest.raises(ArgumentError, match="tokenizer=None"):
        build_demo(RecommenderModel(RecommenderConfig(backbone={"hidden_size": 8}, vocab_size=6)))


def test_titles_without_a_model_are_refused():
    with pytest.raises(ArgumentError, match=r"item_titles='t\.csv': there is no model"):
        cli.demo(["--item_titles", "t.csv"])


def test_missing_titles_are_named(saved):
    words = ["--item_titles", "no.csv", "--port", str(free_port())]
    with pytest.raises(DataError, match=r"no\.csv: no such file"):
        cli.demo(["--model_name_or_path", str(saved), *words])


def test_a_port_in_use_is_named_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ArgumentError, match=f"port={port}: in use. Pass another port"):
            cli.demo(["--model_name_or_path", "no such model", "--port", str(port)])


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_no_port_is_named(port):
    with pytest.raises(ArgumentError, match=f"port={port}: no port"):
        check_address("127.0.0.1", port)


def test_an_address_of_another_machine_is_named():
    with pytest.raises(ArgumentError, match=r"host='192\.0\.2\.1': nothing can be served there"):
        check_address("192.0.2.1", 7860)


def test_an_unknown_model_is_the_loaders_error(tmp_path):
    with pytest.raises(ArgumentError, match="nowhere"):
        cli.demo(["--model_name_or_path", str(tmp_path / "nowhere"), "--port", str(free_port())])


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(room.__package__ + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("hf_rece.serving.demo")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("sys.argv", ["hf-rece", "demo"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert 'Install it: pip install "hf_rece[demo]"' in error
    assert len(error.split()) < 20


def test_the_space_shows_the_model_that_its_variable_names(saved, monkeypatch):
    monkeypatch.setenv("MODEL_ID", str(saved))
    space = runpy.run_path(str(ROOT / "recipes" / "demo" / "app.py"))
    assert "Find one of 58 items" in said(space["demo"])


def test_the_space_runs_the_gradio_that_is_tested():
    (version,) = re.findall(r"sdk_version: (.*)", (ROOT / "recipes/demo/README.md").read_text())
    assert f"gradio=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
