"""LargeVocabTrainer on language models: gradients, exact evaluation, ids and ranks."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_rece import (
    ArgumentError,
    LargeVocabTrainer,
    LargeVocabTrainingArguments,
    find_head,
    replace_output_head,
)
from tests.processes import findings_of_two_processes

VOCABULARY = 99


def language_model(**overrides):
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**config))


def sequences(n, longest=12, seed=0):
    draw = np.random.default_rng(seed)
    rows = [draw.integers(3, VOCABULARY, draw.integers(3, longest)).tolist() for _ in range(n)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def padded(rows):
    length = max(len(row["input_ids"]) for row in rows)

    def stack(name, filler):
        return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

    ids, labels = stack("input_ids", 0), stack("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


def trainer_of(model, folder, **settings):
    trainer_settings = {
        name: settings.pop(name)
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
        if name in settings
    }
    defaults = {
        "loss_type": "cross_entropy",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return LargeVocabTrainer(
        model,
        LargeVocabTrainingArguments(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=sequences(32),
        eval_dataset=sequences(13, seed=1),
        data_collator=padded,
        **trainer_settings,
    )


def mean_loss(model, dataset):
    """The exact cross-entropy over all tokens, one dense row at a time."""
    model.eval()
    total = count = 0
    for row in dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def gradients_of_one_step(folder, batch_size, accumulation):
    """Gradients of one optimiser step over the same 32 sequences."""
    model = language_model()
    found = {}
    trainer = trainer_of(
        model,
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    step = trainer.create_optimizer().step

    def noting_step(*args, **kwargs):
        found.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return step(*args, **kwargs)

    trainer.optimizer.step = noting_step
    trainer.train()
    return found


def test_gradients_do_not_depend_on_how_a_batch_is_cut_up(tmp_path):
    whole = gradients_of_one_step(tmp_path / "whole", 32, 1)
    pieces = gradients_of_one_step(tmp_path / "pieces", 4, 8)
    assert len(whole) > 10
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["stratified", "rece", "sampled_softmax"])
def test_evaluation_is_exact_whatever_the_training_loss(tmp_path, loss_type):
    model = language_model()
    trainer = trainer_of(model, tmp_path, loss_type=loss_type, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    exact = mean_loss(model, trainer.eval_dataset)
    assert metrics["eval_loss"] == pytest.approx(exact, abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(exact), rel=1e-5)


def test_only_the_loss_of_evaluation_is_exact_too(tmp_path):
    trainer = trainer_of(language_model(), tmp_path, prediction_loss_only=True)
    exact = mean_loss(trainer.model, trainer.eval_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(exact, abs=1e-5)


def test_accuracy_and_entropy_are_those_of_the_logits(tmp_path):
    trainer = trainer_of(language_model(), tmp_path)
    metrics = trainer.evaluate()
    right, entropy, count = 0, 0.0, 0
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, :-1]
        right += int((logits.argmax(-1) == ids[0, 1:]).sum())
        entropy += float(torch.distributions.Categorical(logits=logits).entropy().sum())
        count += ids.shape[1] - 1
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right / count)
    assert metrics["eval_entropy"] == pytest.approx(entropy / count, abs=1e-4)


def id_metrics(prediction):
    predicted, ranks = prediction.predictions
    labelled = prediction.label_ids != -100
    return {
        "accuracy": float((predicted == prediction.label_ids)[labelled].mean()),
        "best_rank_is_right": float(
            ((ranks == 1) == (predicted == prediction.label_ids))[labelled].mean()
        ),
        "rows": len(predicted),
    }


def test_compute_metrics_gets_predicted_ids_and_ranks(tmp_path):
    trainer = trainer_of(language_model(), tmp_path, compute_metrics=id_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])
    assert metrics["eval_best_rank_is_right"] == 1
    assert metrics["eval_rows"] == 13


def test_metrics_by_batch_add_up_to_the_same(tmp_path):
    whole = trainer_of(language_model(), tmp_path / "whole").evaluate()
    by_batch = trainer_of(language_model(), tmp_path / "batch", batch_eval_metrics=True).evaluate()
    for name in ("eval_loss", "eval_perplexity", "eval_entropy"):
        assert by_batch[name] == pytest.approx(whole[name])


def test_predict_returns_ids_ranks_and_aligned_labels(tmp_path):
    trainer = trainer_of(language_model(), tmp_path)
    rows = sequences(3)
    output = trainer.predict(rows)
    predicted, ranks = output.predictions
    labels = output.label_ids[0]
    assert predicted.shape == ranks.shape == output.label_ids.shape
    np.testing.assert_array_equal(labels[labels != -100], rows[0]["labels"][1:])


def test_the_head_stays_and_generation_does_not_change(tmp_path):
    model = language_model()
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    trainer_of(model, tmp_path)
    assert find_head(model) is not None
    torch.testing.assert_close(model.generate(ids, max_new_tokens=4, do_sample=False), before)


def test_a_head_that_is_there_takes_the_loss_of_the_arguments(tmp_path):
    model = language_model()
    trainer_of(model, tmp_path, loss_type="rece")
    trainer_of(model, tmp_path, loss_type="sce")
    assert find_head(model).loss.loss_type == "sce"


def test_without_a_loss_type_a_model_keeps_its_own(tmp_path):
    model = language_model()
    trainer = trainer_of(model, tmp_path, loss_type=None)
    assert find_head(model) is None
    assert "eval_loss" in trainer.evaluate()


def test_gpt2_trains_and_its_loss_falls(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32,
            bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    trainer = trainer_of(
        model,
        tmp_path,
        loss_type="stratified",
        loss_kwargs={"n_hard": 16, "n_random": 16},
        num_train_epochs=15,
        learning_rate=1e-2,
    )
    trainer.eval_dataset = trainer.train_dataset
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("preprocess_logits_for_metrics", lambda logits, labels: logits),
        ("compute_loss_func", lambda outputs, labels, num_items_in_batch=None: outputs.loss),
    ],
)
def test_what_needs_logits_is_refused(tmp_path, setting, value):
    with pytest.raises(ArgumentError, match=setting):
        trainer_of(language_model(), tmp_path, **{setting: value})


# ------------------------------------------------------------------------------- several processes


def findings(folder, world):
    """Metrics before and after training in `world` processes, and the sum of the weights."""
    model = language_model()
    trainer = trainer_of(
        model,
        folder,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        max_steps=2,
        train_sampling_strategy="sequential",
        compute_metrics=id_metrics,
    )
    assert trainer.args.world_size == world
    found = []
    for train in (lambda: None, trainer.train):
        train()
        metrics = trainer.evaluate()
        timed = ("runtime", "per_second", "epoch", "preparation_time")
        found.append({name: v for name, v in metrics.items() if not name.endswith(timed)})
    return [*found, sum(float(p.detach().double().sum()) for p in model.parameters())]


def test_two_processes_train_and_evaluate_as_one(tmp_path):
    of_processes = findings_of_two_processes("tests.training.test_language_model", tmp_path)
    *wanted, weights = findings(tmp_path, 1)
    for *found, total in of_processes:
        for got, want in zip(found, wanted, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
        assert total == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("loss_type", [None, "stratified"])
def test_a_memory_budget_reaches_the_head_of_a_language_model(loss_type, tmp_path):
    model = replace_output_head(language_model(), "rece", n_rounds=1)
    trainer = trainer_of(model, tmp_path, loss_type=loss_type, memory_budget="1GiB", max_steps=1)
    trainer.train()
    loss = find_head(trainer.model).loss
    assert loss.loss_type == (loss_type or "rece")
    assert loss.config.memory_budget == "1GiB"
    assert loss_type or loss.config.n_rounds == 1
