"""TRL's SFT: what it prepares and logs stays, its fused head never runs, ours does."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

import hf_rece
from hf_rece import (
    ArgumentError,
    LargeVocabTrainer,
    LargeVocabTrainingArguments,
    find_head,
    replace_output_head,
    restore_output_head,
)
from hf_rece.head.replace import kernel_calls
from tests.processes import findings_of_two_processes

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

from hf_rece import LargeVocabSFTConfig, LargeVocabSFTTrainer  # noqa: E402

VOCABULARY = 101
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w1 {{ m['content'] }} w2 {% else %}"
    "{% generation %}{{ m['content'] }} <end>{% endgeneration %}{% endif %}{% endfor %}"
)
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **SHAPE, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
            router_aux_loss_coef=0.1,
        )
    )  # fmt: skip


def make_tokenizer():
    words = {w: i for i, w in enumerate(["<end>", "<pad>", *[f"w{i}" for i in range(99)]])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", chat_template=CHAT
    )


tokenizer = pytest.fixture(make_tokenizer, scope="module", name="tokenizer")


def words(seed, n):
    draw = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(3, 99, (n,), generator=draw))


TEXTS = Dataset.from_list([{"text": words(i, 3 + i % 9)} for i in range(16)])
PAIRS = Dataset.from_list(
    [{"prompt": words(i, 4) + " ", "completion": words(90 + i, 2 + i % 6)} for i in range(16)]
)
CHATS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": words(i, 3)},
                {"role": "assistant", "content": words(50 + i, 2 + i % 5)},
            ]
        }
        for i in range(16)
    ]
)


def run(trainer_class, config_class, model, data, tokenizer, folder, **settings):
    """Train four steps; return the trainer and what it logged."""
    to_trainer = ("peft_config", "compute_metrics", "compute_loss_func")
    extra = {name: settings.pop(name) for name in to_trainer if name in settings}
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "max_length": 32,
        "disable_tqdm": True, "bf16": False,
    }  # fmt: skip
    trainer = trainer_class(
        model,
        args=config_class(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        **extra,
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


SETTINGS = {
    "plain": (llama, TEXTS, {}),
    "tied": (lambda: llama(tie_word_embeddings=True), TEXTS, {}),
    "packing": (llama, TEXTS, {"packing": True, "packing_strategy": "bfd"}),
    "padding free": (llama, TEXTS, {"padding_free": True, "max_length": None}),
    "completions": (llama, PAIRS, {"completion_only_loss": True}),
    "assistant": (llama, CHATS, {"assistant_only_loss": True}),
    "accumulation": (
        llama,
        TEXTS,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "checkpointing": (llama, TEXTS, {"gradient_checkpointing": True}),
    "experts": (mixtral, TEXTS, {"gradient_accumulation_steps": 2}),
    "dft": (llama, TEXTS, {"loss_type": "dft"}),
    "lora": (llama, TEXTS, {"peft_config": {"target_modules": "all-linear"}}),
    "saved head": (
        llama,
        TEXTS,
        {"peft_config": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
    ),
}


def train(model, data, tokenizer, folder, **settings):
    """Train by our trainer; return it and what it logged."""
    settings = {"loss_type": "cross_entropy", **settings}
    return run(
        LargeVocabSFTTrainer, LargeVocabSFTConfig, model, data, tokenizer, folder, **settings
    )


LOGGED = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_exact_loss_trains_and_logs_as_trl_does(name, tokenizer, tmp_path, monkeypatch):
    make, data, settings = SETTINGS[name]

    def fresh():
        given = dict(settings)
        if "peft_config" in given:
            torch.manual_seed(1)
            given["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **given["peft_config"])
        return given

    wanted, wanted_log = run(
        SFTTrainer, SFTConfig, make(), data, tokenizer, tmp_path / "trl", **fresh()
    )

    def never(*args, **kwargs):
        raise AssertionError("TRL's fused head ran")

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", never)
    ours = {"loss_type": "cross_entropy", **fresh()}
    trainer, log = run(
        LargeVocabSFTTrainer, LargeVocabSFTConfig, make(), data, tokenizer, tmp_path / "ours",
        **ours,
    )  # fmt: skip
    assert kernel_calls(trainer.model) == 4 * settings.get("gradient_accumulation_steps", 1)
    for got, want in zip(log, wanted_log, strict=True):
        assert got.keys() == want.keys() | {"peak_mib"}
        for metric in LOGGED & want.keys():
            assert got[metric] == pytest.approx(want[metric], abs=1e-5, rel=1e-5), metric
    others = dict(wanted.model.named_parameters())
    for parameter, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, others[parameter], rtol=1e-5, atol=1e-5)


def test_the_stratified_loss_learns(tokenizer, tmp_path):
    knobs = '{"n_hard": 32, "n_random": 32}'
    _, log = train(
        llama(), TEXTS, tokenizer, tmp_path,
        loss_type="stratified", loss_kwargs=knobs, max_steps=30,
    )  # fmt: skip
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[-1]["mean_token_accuracy"] > log[0]["mean_token_accuracy"]


def test_the_stratified_loss_is_exact_where_every_class_is_hard(tokenizer, tmp_path):
    exact, wanted = train(llama(), TEXTS, tokenizer, tmp_path)
    knobs = {"n_hard": VOCABULARY}
    trainer, log = train(
        llama(), TEXTS, tokenizer, tmp_path, loss_type="stratified", loss_kwargs=knobs
    )
    for got, want in zip(log, wanted, strict=True):
        for metric in LOGGED & want.keys():
            assert got[metric] == pytest.approx(want[metric], abs=1e-5, rel=1e-5), metric
    for value, want in zip(trainer.model.parameters(), exact.model.parameters(), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)


class Logits(TorchDispatchMode):
    """Notes tensors of at least (tokens x vocabulary) numbers."""

    def __init__(self, n_tokens, n_classes):
        super().__init__()
        self.n_numbers, self.found = n_tokens * n_classes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.n_numbers:
                self.found.append((str(func), tuple(tensor.shape)))
        return result


@pytest.mark.parametrize("loss_type", ["cross_entropy", "stratified"])
def test_no_logits_are_made(loss_type, tokenizer, tmp_path):
    data = Dataset.from_list([{"text": words(i, 31)} for i in range(4)])
    with Logits(4 * 31, 20011) as logits:
        trainer, _ = train(
            llama(vocab_size=20011), data, tokenizer, tmp_path, max_steps=2, loss_type=loss_type,
            compute_metrics=lambda prediction: {"rows": len(prediction.label_ids)},
        )  # fmt: skip
        assert kernel_calls(trainer.model) == 2
        assert trainer.evaluate()["eval_rows"] == 4
        assert logits.found == []
        ids = torch.tensor(trainer.train_dataset["input_ids"][:])
        trainer.model(input_ids=ids)
        assert logits.found  # what the test would have seen


# ------------------------------------------------------------------------------------ evaluation


def exact_loss(model, data, tokenizer):
    """Return the mean loss over the completions' tokens, from logits of one row at a time."""
    model, total, count = model.eval(), 0.0, 0
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [0]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        n_labels = len(ids) - len(prompt)
        total, count = total + loss.item() * n_labels, count + n_labels
    return total / count


@pytest.mark.parametrize("joined", [{}, {"padding_free": True, "max_length": None}])
def test_evaluation_is_exact_and_by_token(joined, tokenizer, tmp_path):
    trainer, _ = train(
        llama(), PAIRS, tokenizer, tmp_path,
        loss_type="stratified", per_device_eval_batch_size=3, max_steps=1, **joined,
    )  # fmt: skip
    metrics = trainer.evaluate()
    wanted = exact_loss(trainer.model, PAIRS, tokenizer)
    assert metrics["eval_loss"] == pytest.approx(wanted, abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(wanted), rel=1e-5)


@pytest.mark.parametrize("joined", [{}, {"padding_free": True, "max_length": None}])
def test_compute_metrics_gets_ids_of_each_row(joined, tokenizer, tmp_path):
    def accuracy(prediction):
        predicted, ranks = prediction.predictions
        labelled = prediction.label_ids != -100
        right = (predicted == prediction.label_ids)[labelled]
        assert (right == (ranks == 1)[labelled]).all()
        return {"accuracy": right.mean(), "rows": len(labelled)}

    trainer, _ = train(
        llama(), PAIRS, tokenizer, tmp_path, per_device_eval_batch_size=3, max_steps=1,
        compute_metrics=accuracy, **joined,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == len(PAIRS)
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])


def test_evaluation_logs_what_trl_does_and_perplexity(tokenizer, tmp_path):
    settings = {"max_steps": 2, "per_device_eval_batch_size": 16}  # TRL averages over batches
    wanted, _ = run(SFTTrainer, SFTConfig, mixtral(), TEXTS, tokenizer, tmp_path, **settings)
    trainer, _ = train(mixtral(), TEXTS, tokenizer, tmp_path, **settings)
    wanted.evaluate(), trainer.evaluate()
    want, got = wanted.state.log_history[-1], trainer.state.log_history[-1]
    assert got.keys() == want.keys() | {"eval_perplexity"}
    for metric in ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss"):
        assert got[f"eval_{metric}"] == pytest.approx(want[f"eval_{metric}"], abs=1e-5)
    assert got["eval_loss"] == pytest.approx(
        want["eval_loss"] - 0.1 * want["eval_aux_loss"], abs=1e-5
    )


def test_the_best_checkpoint_is_the_least_perplexed(tmp_path):
    for arguments in (LargeVocabSFTConfig, LargeVocabTrainingArguments):
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
        metric = {"metric_for_best_model": "eval_perplexity"}
        assert arguments(**settings, **metric).greater_is_better is False
        assert arguments(**settings, **metric, greater_is_better=True).greater_is_better is True
        assert arguments(**settings).greater_is_better is None


# ------------------------------------------------------------------------------------- the model


GENERATE = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("w3 w4 w5", return_tensors="pt").input_ids
generated = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(generated[0]))
"""


def test_an_adapter_generates_the_same_text_in_a_fresh_process(tokenizer, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    trainer, _ = run(
        LargeVocabSFTTrainer, LargeVocabSFTConfig, str(tmp_path / "base"), TEXTS, tokenizer,
        tmp_path / "run",
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )  # fmt: skip
    trainer.save_model()
    ids = tokenizer("w3 w4 w5", return_tensors="pt").input_ids
    wanted = trainer.model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == tokenizer.decode(wanted[0])


def test_generation_and_the_signature_do_not_change(tokenizer, tmp_path):
    model, ids = llama().eval(), torch.tensor([[5, 6, 7]])
    wanted = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    train(model, TEXTS, tokenizer, tmp_path, learning_rate=0.0)
    got = model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, wanted)
    assert model(input_ids=ids).logits.shape == (1, 3, VOCABULARY)


def test_a_copy_trains_itself(tokenizer, tmp_path):
    model = train(llama(), TEXTS, tokenizer, tmp_path, max_steps=1)[0].model
    twin = copy.deepcopy(model)
    ids = torch.tensor([[5, 6, 7]])
    twin.train()(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
    assert (kernel_calls(model), kernel_calls(twin)) == (1, 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert twin.lm_head.weight.grad.abs().sum() > 0


def test_a_batch_without_labels_has_no_gradient(tokenizer, tmp_path):
    model = train(llama(), TEXTS, tokenizer, tmp_path, max_steps=1)[0].model.train()
    ids = torch.tensor([[5, 6, 7]])
    output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    output.log_probs.sum().backward()
    assert (output.loss.item(), output.label_mask.any().item()) == (0.0, False)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_shifted_labels_are_taken_as_they_are(tokenizer, tmp_path):
    model = train(llama(), TEXTS, tokenizer, tmp_path, max_steps=1)[0].model.train()
    ids, shifted = torch.tensor([[5, 6, 7]]), torch.tensor([[6, 7, -100]])
    plain = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    given = model(input_ids=ids, labels=ids, shift_labels=shifted, fused_lm_head=True).log_probs
    assert (plain.shape, given.shape) == ((1, 2), (1, 3))
    torch.testing.assert_close(given[:, :2], plain)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "peft"])
def test_a_replaced_model_takes_the_loss_of_the_arguments(adapted, tokenizer, tmp_path):
    model = replace_output_head(llama(), "sce")
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    train(model, TEXTS, tokenizer, tmp_path, max_steps=1, loss_type="rece")
    assert (find_head(model).loss.loss_type, kernel_calls(model)) == ("rece", 1)


def test_one_training_follows_another(tokenizer, tmp_path):
    """TRL's, ours twice, that of LargeVocabTrainer, and by hand."""
    model = llama()
    run(SFTTrainer, SFTConfig, model, TEXTS, tokenizer, tmp_path, max_steps=1)
    train(model, TEXTS, tokenizer, tmp_path, max_steps=1)
    train(model, TEXTS, tokenizer, tmp_path, max_steps=1, loss_type="rece")
    assert kernel_calls(model) == 2
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "loss_type": "sce"}
    LargeVocabTrainer(model, LargeVocabTrainingArguments(**settings))
    assert find_head(model).loss.loss_type == "sce"
    assert "forward" not in vars(restore_output_head(model))
    replace_output_head(model, "rece")


def test_a_second_training_has_the_precision_of_the_first(tokenizer, tmp_path):
    settings = {"bf16": True, "max_steps": 2}
    _, wanted = run(SFTTrainer, SFTConfig, llama(), TEXTS, tokenizer, tmp_path, **settings)
    model, kinds = llama(), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, given, result: kinds.append(result.dtype))
    _, log = train(model, TEXTS, tokenizer, tmp_path, **settings)
    for got, want in zip(log, wanted, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=2e-3)
    kinds.clear()
    train(model, TEXTS, tokenizer, tmp_path, **settings)
    assert set(kinds) == {torch.bfloat16}


# ----------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize("loss_type", ["rece", "dft", "nll"])
def test_the_configuration_keeps_the_name_of_the_loss(loss_type, tokenizer, tmp_path):
    trainer, _ = train(llama(), TEXTS, tokenizer, tmp_path, loss_type=loss_type, max_steps=1)
    assert trainer.args.loss_type == trainer.args.to_dict()["loss_type"] == loss_type
    assert json.loads(trainer.args.to_json_string())["loss_type"] == loss_type


def test_the_command_line_takes_knobs_as_json(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--loss_kwargs", '{"n_hard": 9}']
    (args,) = HfArgumentParser(LargeVocabSFTConfig).parse_args_into_dataclasses(flags)
    assert (args.loss_type, args.loss_kwargs) == ("stratified", {"n_hard": 9})
    # TRL's defaults stay.
    assert args.learning_rate == SFTConfig(str(tmp_path), use_cpu=True).learning_rate


def test_trl_still_refuses_an_adapter_on_the_output_layer(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        run(
            LargeVocabSFTTrainer, LargeVocabSFTConfig, llama(), TEXTS, tokenizer, tmp_path,
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "nothing"}, "no such loss"),
        ({"loss_kwargs": {"n_rounds": 2}}, "stratified does not take them"),
        ({"loss_kwargs": "[1]"}, "not a JSON object"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor.*there are no logits"),
        ({"use_liger_kernel": True}, "use_liger_kernel.*there are no logits"),
        ({"compute_loss_func": len}, "compute_loss_func.*there are no logits"),
    ],
)
def test_bad_settings_are_refused_before_training(tokenizer, tmp_path, settings, message):
    with pytest.raises(ArgumentError, match=message):
        run(
            LargeVocabSFTTrainer, LargeVocabSFTConfig, llama(), TEXTS, tokenizer, tmp_path,
            **settings,
        )  # fmt: skip


def test_the_configuration_of_trl_names_no_loss_of_ours(tokenizer, tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ArgumentError, match="args='SFTConfig': it names no loss"):
        LargeVocabSFTTrainer(llama(), args, train_dataset=TEXTS, processing_class=tokenizer)


class NoTRL:
    """Finder of a Python without trl."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "trl":
            raise ModuleNotFoundError("No module named 'trl'", name="trl")


@pytest.mark.parametrize("name", ["LargeVocabSFTTrainer", "LargeVocabSFTConfig"])
def test_without_trl_the_extra_is_named(name, monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_rece.training.sft")
    for module in [module for module in sys.modules if module.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [NoTRL, *sys.meta_path])
    with pytest.raises(ImportError, match=r'pip install "hf_rece\[trl\]"'):
        getattr(hf_rece, name)


# ------------------------------------------------------------------------------- several processes


def findings(folder, world):
    """Return what training and evaluating in `world` processes log, by setting."""
    data = TEXTS.select(range(13))  # the last batch is uneven
    found = {}
    for name, settings in {
        "padded": {},
        "joined": {"padding_free": True, "max_length": None},
        # Rows of different numbers of documents, and few of them: equal only without training.
        "packed": {"packing": True, "max_length": 16, "learning_rate": 0.0},
    }.items():
        trainer, log = train(
            llama(), data, make_tokenizer(), folder, max_steps=3,
            per_device_train_batch_size=4 // world, per_device_eval_batch_size=3,
            train_sampling_strategy="sequential", **settings,
        )  # fmt: skip
        assert trainer.args.world_size == world
        entries = [*log, {**trainer.evaluate()}] if name != "packed" else [trainer.evaluate()]
        timed = ("runtime", "per_second", "epoch", "peak_mib")
        found[name] = [
            {k: v for k, v in entry.items() if not k.endswith(timed)} for entry in entries
        ]
        found[name][-1].pop("eval_num_tokens")
    return found


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    of_processes = findings_of_two_processes("tests.training.test_sft", tmp_path)
    wanted = findings(tmp_path, 1)
    for found in of_processes:
        for name, entries in wanted.items():
            for got, want in zip(found[name], entries, strict=True):
                assert got == pytest.approx(want, abs=2e-5, rel=2e-5), name
