"""Fine-tuning from the shell: an adapter or a whole model, with a card, and back."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_rece import cli
from hf_rece.errors import ArgumentError, DataError

pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model, its tokenizer and question-answer pairs."""
    folder = tmp_path_factory.mktemp("base")
    words = {w: i for i, w in enumerate(["<end>", *[f"w{i}" for i in range(60)]])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    config.save_pretrained(folder / "empty")
    tokenizer.save_pretrained(folder / "empty")
    pairs = [{"q": f"w{i} w{i + 1} ", "a": f"w{i + 2} w{i + 3}"} for i in range(50)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def words_for(base, output, *more, model="model"):
    return [
        "--model_name_or_path", str(base / model), "--train_file", str(base / "pairs.jsonl"),
        "--prompt_column", "q", "--completion_column", "a", "--output_dir", str(output),
        "--use_cpu", "--bf16", "false", "--disable_tqdm", "true", "--learning_rate", "0.02",
        "--loss_kwargs", '{"n_hard": 16, "n_random": 16}', "--report_to", "none", *more,
    ]  # fmt: skip


def test_an_adapter_is_trained_saved_and_loads_again(base, tmp_path, capsys):
    output = tmp_path / "adapter"
    cli.finetune(
        words_for(base, output, "--use_peft", "--lora_target_modules", "q_proj", "down_proj")
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["perplexity_after"] < metrics["perplexity_before"]
    assert f"{metrics['perplexity_after']:,.4f}" in capsys.readouterr().out
    model = peft.AutoPeftModelForCausalLM.from_pretrained(output)
    assert {p.name for p in output.iterdir()} >= {"adapter_model.safetensors", "README.md"}
    generated = model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=3)
    assert generated.shape[1] > 2


def test_a_folder_without_weights_starts_from_random_ones(base, tmp_path):
    output = tmp_path / "whole"
    cli.finetune(words_for(base, output, "--num_train_epochs", "8", model="empty"))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["perplexity_after"] < 0.8 * metrics["perplexity_before"]
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 61


def test_the_card_names_loss_and_perplexity_and_no_path(base, tmp_path):
    output = tmp_path / "card"
    cli.finetune(words_for(base, output, "--loss_type", "stratified"))
    card = ModelCard.load(output / "README.md")
    metrics = json.loads((output / "metrics.json").read_text())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == (
        "perplexity",
        round(metrics["perplexity_after"], 4),
    )
    assert "`stratified`" in card.text
    assert str(tmp_path) not in str(card)
    assert str(base) not in str(card)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("adapter", [True, False])
def test_what_is_pushed_has_the_card_of_the_run(base, tmp_path, hub, adapter):
    more = ["--use_peft", "--lora_target_modules", "q_proj", "down_proj"] if adapter else []
    push = ["--push_to_hub", "--hub_model_id", "user/lm", "--hub_strategy", "end"]
    cli.finetune(words_for(base, tmp_path / "run", *more, *push))
    card = ModelCard.load("user/lm")
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert card.data.eval_results[0].metric_type == "perplexity"
    assert '.from_pretrained("user/lm")' in card.text
    assert str(base) not in str(card)
    loads = peft.AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    if not adapter:
        assert loads.from_pretrained("user/lm").config.vocab_size == 61


def test_a_readme_of_somebody_survives_fine_tuning(base, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "README.md").write_text("# Mine\n")
    cli.finetune(
        words_for(base, output, "--use_peft", "--lora_target_modules", "q_proj", "down_proj")
    )
    assert (output / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (["--train_file", "gone.jsonl"], DataError, "no such file"),
        (["--prompt_column", "nothing"], DataError, "no column nothing"),
        (["--dataset_name", "user/set"], ArgumentError, "exactly one source"),
        (["--loss_type", "nothing"], ArgumentError, "no such loss"),
    ],
)
def test_bad_arguments_are_named(base, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        cli.finetune([*words_for(base, tmp_path / "run"), *change])


def spoil_index(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_shards(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def need_code(folder):
    own = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change(folder / "config.json", model_type="evil", auto_map=own)


def need_code_without_weights(folder):
    need_code(folder)
    (folder / "model.safetensors").unlink()


def need_code_of_tokenizer(folder):
    own = {"AutoTokenizer": ["evil.Evil", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=own)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_index, DataError, r"names files elsewhere \(\.\./elsewhere"),
        (lose_shards, DataError, "there is no model-00001-of-00002"),
        (need_code, ArgumentError, "(model_name_or_path|tokenizer)=.*code that comes with it"),
        (need_code_without_weights, ArgumentError, "code that comes with it"),
        (need_code_of_tokenizer, ArgumentError, "tokenizer=.*code that comes with it"),
    ],
)
def test_a_model_that_reaches_beyond_its_weights_is_refused(base, tmp_path, spoil, error, message):
    folder = tmp_path / "model"
    shutil.copytree(base / "model", folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    spoil(folder)
    words = words_for(base, tmp_path / "run", "--model_name_or_path", str(folder))
    with pytest.raises(error, match=message):
        cli.finetune(words)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()
