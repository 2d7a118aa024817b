"""TRL's SFT: what it prepares and logs stays, its fused head never runs, ours does."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_rece.errors import ArgumentError
from hf_rece.head.replace import kernel_calls

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


@pytest.fixture(scope="module")
def tokenizer():
    words = {w: i for i, w in enumerate(["<end>", "<pad>", *[f"w{i}" for i in range(99)]])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", chat_template=CHAT
    )


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
    extra = {"peft_config": settings.pop("peft_config")} if "peft_config" in settings else {}
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
        assert got.keys() == want.keys()
        for metric in LOGGED & want.keys():
            assert got[metric] == pytest.approx(want[metric], abs=2e-5, rel=2e-5), metric
    others = dict(wanted.model.named_parameters())
    for parameter, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, others[parameter], rtol=1e-4, atol=1e-4)


def test_the_stratified_loss_learns(tokenizer, tmp_path):
    _, log = run(
        LargeVocabSFTTrainer, LargeVocabSFTConfig, llama(), TEXTS, tokenizer, tmp_path,
        loss_kwargs='{"n_hard": 32, "n_random": 32}', max_steps=30,
    )  # fmt: skip
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[-1]["mean_token_accuracy"] > log[0]["mean_token_accuracy"]


def test_evaluation_is_exact_and_by_token(tokenizer, tmp_path):
    trainer, _ = run(
        LargeVocabSFTTrainer, LargeVocabSFTConfig, llama(), PAIRS, tokenizer, tmp_path,
        per_device_eval_batch_size=3, max_steps=1,
    )  # fmt: skip
    metrics = trainer.evaluate()
    model, total, count = trainer.model.eval(), 0.0, 0
    for row in PAIRS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [0]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        n_labels = len(ids) - len(prompt)
        total, count = total + loss.item() * n_labels, count + n_labels
    assert metrics["eval_loss"] == pytest.approx(total / count, abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(float(torch.tensor(total / count).exp()))


def test_an_adapter_comes_back_from_disk_and_generates_the_same(tokenizer, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    trainer, _ = run(
        LargeVocabSFTTrainer, LargeVocabSFTConfig, str(tmp_path / "base"), TEXTS, tokenizer,
        tmp_path / "run",
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )  # fmt: skip
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7]])
    wanted = trainer.model.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "run")
    got = again.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, wanted)


def test_the_configuration_keeps_the_name_of_the_loss(tokenizer, tmp_path):
    trainer, _ = run(
        LargeVocabSFTTrainer, LargeVocabSFTConfig, llama(), TEXTS, tokenizer, tmp_path,
        loss_type="rece", max_steps=1,
    )  # fmt: skip
    assert json.loads(trainer.args.to_json_string())["loss_type"] == "rece"


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
        ({"label_smoothing_factor": 0.1}, "there are no logits"),
    ],
)
def test_bad_settings_are_refused_before_training(tokenizer, tmp_path, settings, message):
    with pytest.raises(ArgumentError, match=message):
        run(
            LargeVocabSFTTrainer, LargeVocabSFTConfig, llama(), TEXTS, tokenizer, tmp_path,
            **settings,
        )  # fmt: skip
