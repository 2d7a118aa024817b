"""The recipes under `accelerate launch`: several processes train and evaluate as one does."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_rece import RecommenderModel, generate_interactions
from tests.launched import findings, launch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BATCH = 16
RECIPES = {
    "train": "sequential_recommendation/train.py",
    "pretrain": "language_model/pretrain.py",
    "finetune": "language_model/finetune.py",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a log, a text, pairs, and a language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    generate_interactions(70, 60).write_parquet(folder / "log.parquet")
    words = {w: i for i, w in enumerate(["<end>", *[f"w{i}" for i in range(60)]])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=0, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draws = torch.randint(60, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in draws))
    pairs = [
        {"q": f"w{i} w{i % 7} " * (1 + i % 3), "a": f"w{i + 2} " * (1 + i % 4)} for i in range(57)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def jobs(inputs, output, world_size, names=tuple(RECIPES)):
    """Return recipes and words for runs of one global batch size, with uneven last batches.

    70 users, 54 blocks of text and 54 pairs are trained on, 16 a step.
    """
    common = [
        "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--logging_steps",
        "1", "--logging_strategy", "steps", "--per_device_eval_batch_size", "3", "--loss_type",
        "cross_entropy", "--learning_rate", "0.01", "--num_train_epochs", "2",
        "--per_device_train_batch_size", str(BATCH // world_size),
    ]  # fmt: skip
    shape = json.dumps({
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "tie_word_embeddings": True,
    })  # fmt: skip
    own = {
        "train": [
            "--train_file", str(inputs / "log.parquet"), "--hidden_size", "16", "--dropout", "0",
            "--max_length", "20", "--warmup_steps", "0",
        ],
        "pretrain": [
            "--train_file", str(inputs / "text.txt"), "--block_size", "16", "--tokenizer",
            str(inputs / "model"), "--config_overrides", shape,
        ],
        "finetune": [
            "--model_name_or_path", str(inputs / "model"), "--train_file",
            str(inputs / "pairs.jsonl"), "--prompt_column", "q", "--completion_column", "a",
            "--bf16", "false",
        ],
    }  # fmt: skip
    return {
        name: (RECIPES[name], [*own[name], "--output_dir", str(output / name), *common])
        for name in names
    }


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """Return the folder of the runs of one process, and what it found."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {name: findings(*job) for name, job in jobs(inputs, folder, 1).items()}


def several(inputs, folder, n_processes, *options):
    return folder, launch(jobs(inputs, folder, n_processes), n_processes, folder, *options)


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.slow)],
    ids=["two", "four"],
)
def together(request, inputs, tmp_path_factory):
    """Return the folder of the runs of several processes under DDP, and what each found."""
    folder, found = several(inputs, tmp_path_factory.mktemp("together"), request.param)
    for of_process in found:
        for run in of_process.values():
            assert (run["world_size"], run["wrapper"]) == (request.param, "DistributedDataParallel")
    return folder, found


@pytest.fixture(scope="module")
def cut(inputs, tmp_path_factory):
    """Return the folder of the runs of two processes under FSDP2, and what each found."""
    folder, found = several(inputs, tmp_path_factory.mktemp("cut"), 2, "fsdp2.yaml", "fsdp")
    for of_process in found:
        for run in of_process.values():
            assert run["world_size"] == 2
            assert run["wrapper"].startswith("FSDP")
    return folder, found


def assert_same_history(found, wanted, name):
    assert len(wanted[name]["history"]) >= 8
    for of_process in found:
        got = torch.tensor(of_process[name]["history"], dtype=torch.float64)
        want = torch.tensor(wanted[name]["history"], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def assert_same_evaluations(found, wanted, name):
    for of_process in found:
        assert of_process[name]["ranks"] == wanted[name]["ranks"]
        for got, want in zip(
            of_process[name]["evaluations"], wanted[name]["evaluations"], strict=True
        ):
            assert got == pytest.approx(want, rel=1e-5)


def assert_same_model(folder, wanted, name):
    saved = load_file(folder / name / "model.safetensors")
    for parameter, weight in load_file(wanted / name / "model.safetensors").items():
        torch.testing.assert_close(saved.pop(parameter), weight, rtol=1e-3, atol=1e-4)
    assert not saved


@pytest.mark.parametrize("name", RECIPES)
def test_loss_and_gradient_norm_of_each_step_are_those_of_one_process(together, alone, name):
    assert_same_history(together[1], alone[1], name)


@pytest.mark.parametrize("name", RECIPES)
def test_metrics_and_ranks_are_those_of_one_process(together, alone, name):
    assert_same_evaluations(together[1], alone[1], name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_saved_model_is_that_of_one_process(together, alone, name):
    assert_same_model(together[0], alone[0], name)
    assert len({tuple(of_process[name]["weights"]) for of_process in together[1]}) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_cut_model_has_the_loss_and_gradient_norm_of_a_whole_one(cut, alone, name):
    assert_same_history(cut[1], alone[1], name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_cut_model_has_the_metrics_and_ranks_of_a_whole_one(cut, alone, name):
    assert_same_evaluations(cut[1], alone[1], name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_cut_model_is_saved_whole(cut, alone, name):
    assert_same_model(cut[0], alone[0], name)


def test_a_recommender_that_was_cut_loads_and_answers(cut, alone):
    ours, whole = (RecommenderModel.from_pretrained(f / "train") for f in (cut[0], alone[0]))
    history = [whole.tokenizer.items[:3]]
    answers = [[found.item for found in m.recommend(history)[0]] for m in (ours, whole)]
    assert answers[0] == answers[1]
