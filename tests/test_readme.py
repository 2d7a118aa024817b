"""README keeps its word: its code runs, its test command is CI's."""

import re
from pathlib import Path

import pytest
import torch

from hf_rece import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_plan_that_is_shown_is_what_the_command_prints(monkeypatch, capsys):
    ((command, shown),) = re.findall(
        r"```bash\n(hf-rece plan .*?)\n```\n\n```text\n(.*?)```", README, re.DOTALL
    )
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", command.split())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads shape the tiles
    cli.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in printed] == shown.splitlines()


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = (code.strip() for _, code in BLOCKS if "pytest" in code)
    assert "\n" not in command
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_figures_name_results_that_are_there():
    for name in re.findall(r"results/[\w.]+", README):
        assert (ROOT / "recipes" / "benchmarks" / name).exists(), name
