"""The recipes under `accelerate launch`: several processes train and evaluate as one does."""

import functools
import importlib.util
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

    61 users, 53 blocks of text and 54 pairs are trained on, 16 a step.
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


# Processes, configuration and options of each way to start; the wrapper that it must have.
STARTS = {
    "two": (2, "ddp.yaml", (), "DistributedDataParallel"),
    "four": (4, "ddp.yaml", (), "DistributedDataParallel"),
    "cut over two": (2, "fsdp2.yaml", ("fsdp",), "FSDP"),
    "zero3": (2, None, ("deepspeed",), "DeepSpeedEngine"),
}
QUICK = ("train", "pretrain")  # TRL takes long to import
# DeepSpeed draws a new language model's weights in an order of its own.
LOADED = ("train", "finetune")
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # the smallest weights are cut too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def marks_of(start):
    """Return the marks of the slow tests of a way to start."""
    if start != "zero3":
        return pytest.mark.slow
    missing = importlib.util.find_spec("deepspeed") is None
    return [pytest.mark.slow, pytest.mark.skipif(missing, reason="needs DeepSpeed")]


def cases(names=tuple(RECIPES), starts=tuple(STARTS)):
    """Parametrize a test by ways to start and recipes, all but one start as slow ones."""
    return pytest.mark.parametrize(
        ("start", "name"),
        [
            (start, name)
            if start == "two" and name in QUICK
            else pytest.param(start, name, marks=marks_of(start))
            for start in starts
            for name in names
            if start != "zero3" or name in LOADED
        ],
    )


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Return the folder of a recipe's run and what came of it: alone, and in each process."""

    @functools.cache
    def alone(names):
        folder = tmp_path_factory.mktemp("alone")
        return folder, {
            name: findings(*job) for name, job in jobs(inputs, folder, 1, names).items()
        }

    @functools.cache
    def together(start, names):
        folder = tmp_path_factory.mktemp("together")
        n_processes, config, options, wrapper = STARTS[start]
        started = jobs(inputs, folder, n_processes, names)
        if "deepspeed" in options:
            (folder / "zero3.json").write_text(json.dumps(ZERO3))
            for _, words in started.values():
                words += ["--deepspeed", str(folder / "zero3.json")]
        found = launch(started, n_processes, folder, config, *options)
        for run in (run for of_process in found for run in of_process.values()):
            assert run["world_size"] == n_processes
            assert run["wrapper"].startswith(wrapper)
        return folder, found

    def of(start, name):
        rest = tuple(recipe for recipe in RECIPES if recipe not in QUICK)
        names = QUICK if name in QUICK else rest
        one, wanted = alone(names)
        # DeepSpeed remembers the first model of a process.
        of_start = {"two": names, "zero3": (name,)}.get(start, tuple(RECIPES))
        folder, found = together(start, of_start)
        return (one / name, wanted[name]), (folder / name, [process[name] for process in found])

    return of


@cases()
def test_loss_and_gradient_norm_of_each_step_are_those_of_one_process(runs, start, name):
    (_, wanted), (_, of_processes) = runs(start, name)
    want = torch.tensor(wanted["history"], dtype=torch.float64)
    assert len(want) >= 8
    for found in of_processes:
        got = torch.tensor(found["history"], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@cases()
def test_metrics_and_ranks_are_those_of_one_process(runs, start, name):
    (_, wanted), (_, of_processes) = runs(start, name)
    for found in of_processes:
        assert found["ranks"] == wanted["ranks"]
        for got, want in zip(found["evaluations"], wanted["evaluations"], strict=True):
            assert got == pytest.approx(want, rel=1e-5)


@cases()
def test_the_saved_model_is_that_of_one_process(runs, start, name):
    (one, _), (folder, of_processes) = runs(start, name)
    saved = load_file(folder / "model.safetensors")
    for parameter, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(saved.pop(parameter), weight, rtol=1e-3, atol=1e-4)
    assert not saved
    if STARTS[start][-1] == "DistributedDataParallel":  # each process has all of them
        assert len({tuple(found["weights"]) for found in of_processes}) == 1


@cases(names=("train",))
def test_a_recommender_of_several_processes_loads_and_answers(runs, start, name):
    (one, _), (folder, _) = runs(start, name)
    ours, whole = (RecommenderModel.from_pretrained(each) for each in (folder, one))
    history = [whole.tokenizer.items[:3]]
    answers = [[found.item for found in m.recommend(history)[0]] for m in (ours, whole)]
    assert answers[0] == answers[1]
