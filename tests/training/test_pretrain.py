"""A language model from scratch, from the shell and back."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_rece import cli
from hf_rece.errors import ArgumentError, DataError

SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a text of 40 words in a fixed order, and a tokenizer.json for them."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"w{i}" for i in range(40)]
    (folder / "text.txt").write_text(" ".join(words * 60))
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<|endoftext|>", *words])}, "<|endoftext|>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(
        folder / "tokenizer"
    )
    return folder


def words_for(text, output, *more):
    return [
        "--train_file", str(text / "text.txt"), "--block_size", "16",
        "--tokenizer", str(text / "tokenizer" / "tokenizer.json"),
        "--config_overrides", json.dumps(SHAPE), "--output_dir", str(output),
        "--use_cpu", "--disable_tqdm", "true", "--learning_rate", "0.02",
        "--loss_kwargs", '{"n_hard": 8, "n_random": 8}', *more,
    ]  # fmt: skip


def test_pretrain_learns_prints_and_saves(text, tmp_path, capsys):
    cli.pretrain(words_for(text, tmp_path / "lm", "--num_train_epochs", "4"))
    shown = capsys.readouterr().out
    metrics = json.loads((tmp_path / "lm" / "metrics.json").read_text())
    assert metrics["perplexity_after"] < 0.5 * metrics["perplexity_before"]
    assert f"{metrics['perplexity_after']:,.4f}" in shown
    assert "tokens/s, peak memory" in shown
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    ids = torch.tensor([tokenizer("w3 w4 w5")["input_ids"]])
    next_id = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(next_id) == "w6"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (["--model_type", "nothing"], ArgumentError, "no such architecture"),
        (["--config_overrides", "[]"], ArgumentError, "not a JSON object"),
        (["--tokenizer", ""], ArgumentError, "none is named"),
        (["--tokenizer", "gone.json"], DataError, "no such file"),
        (["--loss_type", "nothing", "--loss_kwargs", "{}"], ArgumentError, "no such loss"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(text, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        cli.pretrain([*words_for(text, tmp_path / "lm"), *change])
    assert not (tmp_path / "lm").exists()
