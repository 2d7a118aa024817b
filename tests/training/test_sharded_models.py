"""FSDP2 in two processes, through the trainers: what a whole model in one process learns."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rece import LargeVocabTrainer, LargeVocabTrainingArguments
from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.sparsity import DynamicSparsityCallback
from hf_rece.training.trainer import RecommenderTrainer
from tests.fsdp_on_cpu import enable, start_anew
from tests.processes import in_processes
from tests.training.test_language_model import padded, sequences
from tests.training.test_trainer import make_data

# PEFT asks transformers for what it deprecates, and saves the table of an adapted head.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
)

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
HISTORIES = (slice(0, 3), slice(5, 9))
RECOMMENDERS = {
    "tied": {},
    "apart, with bias": {"tie_word_embeddings": False, "output_bias": True},
    "without a last norm": {"backbone": {"norm_first": False}},
    "over llama": {"backbone": {"model_type": "llama", "intermediate_size": 32}},
    "composed": {"item_embedding": {"type": "compositional", "compression": 3, "codes": "id"}},
    "lma, apart, with bias": {
        "item_embedding": {"type": "lma", "compression": 2},
        "tie_word_embeddings": False,
        "output_bias": True,
    },
}
LANGUAGE_MODELS = ("language model", "tied language model", "adapted head")


def settings(folder, world_size, **arguments):
    sharding = FSDP if world_size > 1 else {}
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 16 // world_size,
        "per_device_eval_batch_size": 11, "max_steps": 3, "learning_rate": 1e-2,
        "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "save_strategy": "no", "train_sampling_strategy": "sequential", **sharding, **arguments,
    }  # fmt: skip


def recommender_trainer(folder, world_size, shape, **arguments):
    start_anew()
    tokenizer, splits = make_data()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = {"model_type": SASRecConfig.model_type, "max_position_embeddings": 20, **sizes}
    backbone |= shape.get("backbone", {})
    if backbone["model_type"] == SASRecConfig.model_type:
        backbone["dropout"] = 0.0
    config = RecommenderConfig(vocab_size=len(tokenizer), **{**shape, "backbone": backbone})
    model = RecommenderModel(config)
    model.tokenizer = tokenizer
    args = RecommenderTrainingArguments(
        max_length=20, ranking_ks=[5, 10], **settings(folder, world_size, **arguments)
    )
    return RecommenderTrainer(
        model, args, train_dataset=splits["train"], eval_dataset=splits["validation"]
    )


def language_model_trainer(folder, world_size, kind):
    start_anew()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=kind == "tied language model",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if kind == "adapted head":
        from peft import LoraConfig, get_peft_model

        modules = ["q_proj", "lm_head"]
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
        )
    args = LargeVocabTrainingArguments(
        loss_type="cross_entropy", **settings(folder, world_size, gradient_accumulation_steps=2)
    )
    return LargeVocabTrainer(
        model, args, train_dataset=sequences(70), eval_dataset=sequences(13, seed=1),
        data_collator=padded,
    )  # fmt: skip


def metrics_of(trainer):
    timed = ("runtime", "per_second", "epoch", "preparation_time")
    return {n: v for n, v in trainer.evaluate().items() if not n.endswith(timed)}


def trained(trainer, folder):
    """Return what came of evaluating, training, evaluating, and saving."""
    before = metrics_of(trainer)
    trainer.train()
    found = {
        "before": before,
        "after": metrics_of(trainer),
        "history": [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e],
        "ranks": [p.tolist() for p in trainer.predict(trainer.eval_dataset).predictions[:2]],
        "model": type(trainer.model).__name__,
    }
    trainer.save_model(folder)
    if isinstance(trainer.model, RecommenderModel):
        items = trainer.model.tokenizer.items
        answers = trainer.model.recommend([items[part] for part in HISTORIES], k=5)
        found["answers"] = [[each.item for each in answer] for answer in answers]
        found["vectors"] = trainer.model.item_vectors(items[:4]).tolist()
    return found


def run(rank, folder, world_size, names):
    if world_size > 1:
        enable()
    found = {}
    for name in names:
        if name in RECOMMENDERS:
            trainer = recommender_trainer(folder / name, world_size, RECOMMENDERS[name])
        else:
            trainer = language_model_trainer(folder / name, world_size, name)
        found[name] = trained(trainer, folder / name)
    return found


QUICK = ("tied", "lma, apart, with bias", "language model")
REST = tuple(name for name in (*RECOMMENDERS, *LANGUAGE_MODELS) if name not in QUICK)


def each(names):
    """Parametrize a test by models, those of a second start of processes as slow ones."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [name if name in QUICK else pytest.param(name, marks=slow) for name in names]
    )


every_model = each((*RECOMMENDERS, *LANGUAGE_MODELS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of a model's run and what came of it, in one process and in each of two."""

    @functools.cache
    def start(names):
        one, two = (tmp_path_factory.mktemp(f"of_{n}") for n in ("one", "two"))
        return (one, run(0, one, 1, names)), (two, in_processes(run, 2, two, 2, names))

    def of(name):
        (one, wanted), (two, found) = start(QUICK if name in QUICK else REST)
        return (one / name, wanted[name]), (two / name, [process[name] for process in found])

    return of


@every_model
def test_loss_and_gradient_norm_are_those_of_one_process(runs, name):
    (_, wanted), (_, of_processes) = runs(name)
    want = torch.tensor(wanted["history"], dtype=torch.float64)
    for found in of_processes:
        assert found["model"].startswith("FSDP")
        got = torch.tensor(found["history"], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("moment", ["before", "after"])
def test_metrics_and_ranks_are_those_of_one_process(runs, name, moment):
    (_, wanted), (_, of_processes) = runs(name)
    for found in of_processes:
        assert found[moment] == pytest.approx(wanted[moment], rel=1e-5)
        assert found["ranks"] == wanted["ranks"]


@every_model
def test_what_is_saved_is_whole(runs, name):
    file = "adapter_model.safetensors" if name == "adapted head" else "model.safetensors"
    (one, _), (two, _) = runs(name)
    saved, wanted = load_file(two / file), load_file(one / file)
    assert set(saved) == set(wanted)
    for parameter, weight in wanted.items():
        torch.testing.assert_close(saved[parameter], weight, rtol=1e-3, atol=1e-4)


@each(RECOMMENDERS)
def test_a_cut_recommender_answers_as_a_whole_one(runs, name):
    (_, wanted), (folder, of_processes) = runs(name)
    for found in of_processes:
        assert found["answers"] == wanted["answers"]
        got, want = torch.tensor(found["vectors"]), torch.tensor(wanted["vectors"])
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    loaded, info = RecommenderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    answers = loaded.recommend([loaded.tokenizer.items[part] for part in HISTORIES], k=5)
    assert [[each.item for each in answer] for answer in answers] == wanted["answers"]


# ------------------------------------------------------------------------- checkpoints, refusals


def resumed(rank, folder):
    enable()
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    best = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 0.05,
    }  # fmt: skip
    whole = recommender_trainer(folder / "whole", 2, {}, **saving)
    whole.train()
    again = recommender_trainer(folder / "again", 2, {}, **saving)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    chosen = recommender_trainer(folder / "best", 2, {}, **saving, **best)
    chosen.train()
    logged = [e["eval_loss"] for e in chosen.state.log_history if "eval_loss" in e]
    return {
        "whole": [p.full_tensor().detach() for p in whole.model.parameters()],
        "again": [p.full_tensor().detach() for p in again.model.parameters()],
        "best": (metrics_of(chosen)["eval_loss"], max(logged), min(logged)),
    }


def refused(rank, folder):
    enable()
    found = {}
    sparse = {"loss_type": "sampled_softmax", "loss_kwargs": {"sparse_grad": True}}
    with pytest.raises(ArgumentError) as caught:
        recommender_trainer(folder, 2, {}, **sparse).train()
    found["sparse_grad"] = str(caught.value)
    trainer = recommender_trainer(folder, 2, {})
    with pytest.raises(ArgumentError) as caught:
        trainer.train(resume_from_checkpoint=str(folder))
    found["checkpoint"] = str(caught.value)
    trainer.add_callback(DynamicSparsityCallback(0.5))
    with pytest.raises(ArgumentError) as caught:
        trainer.train()
    found["DynamicSparsityCallback"] = str(caught.value)
    return found


def in_half_precision(rank, folder):
    """Return the exact losses of users by a model that computes in bfloat16."""
    enable()
    trainer = recommender_trainer(folder, 2, {}, bf16=True)
    trainer.train()
    losses = trainer.predict(trainer.eval_dataset).predictions[3]
    return torch.as_tensor(losses), [e["loss"] for e in trainer.state.log_history if "loss" in e]


def both(rank, folder):
    return {
        "resumed": resumed(rank, folder),
        "refused": refused(rank, folder),
        "half": in_half_precision(rank, folder),
    }


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return in_processes(both, 2, tmp_path_factory.mktemp("others"))


def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(others):
    for found in others:
        runs = found["resumed"]
        for got, wanted in zip(runs["again"], runs["whole"], strict=True):
            assert torch.equal(got, wanted)


def test_the_best_checkpoint_is_loaded_at_the_end(others):
    for found in others:
        got, best, worst = found["resumed"]["best"]
        assert best > worst
        assert got == pytest.approx(best, rel=1e-6)


def test_losses_of_a_model_in_half_precision_keep_their_digits(others):
    for found in others:
        losses, history = found["half"]
        assert losses.dtype == torch.float32
        assert (losses != losses.bfloat16().float()).any()
        assert any(loss != torch.tensor(loss).bfloat16().item() for loss in history)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse_grad", "sparse_grad=True: FSDP cuts"),
        ("DynamicSparsityCallback", "DynamicSparsityCallback=True: FSDP cuts"),
        ("checkpoint", "no trainer_state.json, pytorch_model_fsdp.bin"),
    ],
)
def test_what_does_not_go_together_is_refused(others, name, message):
    assert message in others[0]["refused"][name]
    of_second = "first process found it damaged" if name == "checkpoint" else message
    assert of_second in others[1]["refused"][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"loss_type": "sampled_softmax", "loss_kwargs": {"sparse_grad": True}},
            "sparse_grad=True: DeepSpeed cuts",
        ),
        ({"nonfinite_loss": "skip"}, "nonfinite_loss='skip': DeepSpeed makes the steps"),
    ],
)
def test_deepspeed_refuses_likewise_wherever_it_is_configured(arguments, message, tmp_path):
    trainer = recommender_trainer(tmp_path, 1, {}, **arguments)
    trainer.is_deepspeed_enabled = True  # as a configuration of accelerate launch makes it
    with pytest.raises(ArgumentError, match=message):
        trainer.train()
