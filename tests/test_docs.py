"""README.md and recipes/README.md keep their word: what they show runs, and says what is so."""

import json
import re
import shlex
from pathlib import Path

import polars as pl
import pytest
import torch

from hf_rece import cli, generate_interactions

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path: (ROOT / path).read_text() for path in ("README.md", "recipes/README.md")}
BLOCKS = [
    (page, language, code)
    for page, text in PAGES.items()
    for language, code in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
]
PYTHON = [(page, code) for page, language, code in BLOCKS if language == "python"]
SHELL = [
    (page, line)
    for page, language, code in BLOCKS
    if language == "bash"
    for line in code.strip().splitlines()
]
# Enough to see that a command works.
SHORT = {
    "train": "--max_steps 3 --hidden_size 8 --use_cpu",
    "pretrain": "--max_steps 2 --block_size 16 --use_cpu",
    "finetune": "--max_steps 2 --use_cpu --bf16 false",
}


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) < 250


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize(("page", "code"), PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(page, code, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Return a folder with the files that the commands read; later ones read what earlier wrote."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("workplace")
    log = generate_interactions(n_users=200, n_items=200)
    log = log.select(user=pl.col("user_id"), item=pl.col("item_id"), time=pl.col("timestamp"))
    log.write_csv(folder / "log.csv")
    (folder / "logs").mkdir()
    log.write_parquet(folder / "logs" / "part-0.parquet")
    users = log.group_by("user", maintain_order=True).agg(pl.col("item").alias("item_ids"))
    users.rename({"user": "user_id"}).write_parquet(folder / "users.parquet")
    words = [f"word{i}" for i in range(50)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<|endoftext|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "book.txt").write_text("\n".join(" ".join(words) for _ in range(40)))
    row = json.dumps({"question": "word1 word2", "answer": "word3 word4"})
    (folder / "questions.jsonl").write_text("\n".join([row] * 40))
    return folder


def test_shell_lines_are_commands_of_ours_or_set_up():
    for _, line in SHELL:
        assert line.startswith(("hf-rece ", "python3 -m venv .venv && ")), line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "line", [line for _, line in SHELL if line.startswith("hf-rece ")], ids=lambda line: line[:40]
)
def test_commands_run(line, workplace, monkeypatch):
    words = shlex.split(line)
    if words[1] == "demo":
        pytest.skip("a server; tests/serving opens the page in a browser")
    if words[1] == "finetune":
        pytest.importorskip("trl")
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", [*words, *SHORT.get(words[1], "").split()])
    cli.main()


def test_the_plan_that_is_shown_is_what_the_command_prints(monkeypatch, capsys):
    ((command, shown),) = re.findall(
        r"```bash\n(hf-rece plan .*?)\n```\n\n```text\n(.*?)```",
        PAGES["recipes/README.md"],
        re.DOTALL,
    )
    from hf_rece.ops import native

    if native.library() is None:
        pytest.skip("shown as it is with the C++ kernels")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", command.split())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads shape the tiles
    cli.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in printed] == shown.splitlines()


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = (line for page, line in SHELL if "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_figures_name_results_that_are_there(page):
    for name in re.findall(r"results/[\w.]+\w", PAGES[page]):
        assert (ROOT / "recipes" / "benchmarks" / name).exists(), name
