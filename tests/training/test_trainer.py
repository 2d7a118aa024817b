"""Training and ranking with Trainer."""

import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.data.synthetic import generate_interactions
from hf_rece.errors import ArgumentError
from hf_rece.metrics.ranking import ranking_metrics
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.training.args import LargeVocabTrainingArguments, RecommenderTrainingArguments
from hf_rece.training.trainer import (
    LargeVocabTrainer,
    RecommenderTrainer,
    most_popular_metrics,
    set_loss,
)
from tests.processes import findings_of_two_processes


def make_data():
    log = generate_interactions(70, 60, seed=0)
    tokenizer = ItemTokenizer.from_interactions(log)
    return tokenizer, leave_one_out_split(log, tokenizer)


data = pytest.fixture(make_data, scope="module", name="data")


def make_trainer(data, folder, **arguments):
    tokenizer, splits = data
    extra = {
        name: arguments.pop(name) for name in ("callbacks", "compute_metrics") if name in arguments
    }
    torch.manual_seed(0)
    backbone = SASRecConfig(hidden_size=16, max_position_embeddings=20, dropout=0.0)
    model = RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=len(tokenizer)))
    model.tokenizer = tokenizer
    settings = {
        "output_dir": str(folder),
        "max_length": 20,
        "ranking_ks": [5, 10],
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return RecommenderTrainer(
        model,
        RecommenderTrainingArguments(**settings),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        **extra,
    )


@pytest.mark.parametrize("loss_type", ["cross_entropy", "rece", "stratified"])
def test_training_lowers_the_exact_loss(data, loss_type, tmp_path):
    trainer = make_trainer(data, tmp_path, loss_type=loss_type, num_train_epochs=5)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.2


def test_the_loss_of_the_arguments_is_saved_with_the_model(data, tmp_path):
    trainer = make_trainer(
        data, tmp_path, loss_type="rece", loss_kwargs='{"n_rounds": 3}', max_steps=1
    )
    trainer.train()
    trainer.save_model(tmp_path / "final")
    again = RecommenderModel.from_pretrained(tmp_path / "final")
    assert (again.config.loss_type, again.config.loss_kwargs) == ("rece", {"n_rounds": 3})
    assert again.tokenizer.items == data[0].items


def test_metrics_equal_those_of_all_users_at_once(data, tmp_path):
    trainer = make_trainer(data, tmp_path, per_device_eval_batch_size=11)
    metrics = trainer.evaluate()
    split = trainer.eval_dataset
    collated = trainer.data_collator([split[i] for i in range(len(split))])
    with torch.no_grad():
        output = trainer.model(**collated, rank_k=10)
    wanted = ranking_metrics(output.greater, output.tied, ks=[5, 10])
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    for name, value in wanted.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value)
    assert 0 < metrics["eval_coverage@10"] <= 1


def test_seen_items_compete_only_when_asked(data, tmp_path):
    filtered = make_trainer(data, tmp_path).predict(data[1]["test"]).predictions[0]
    everything = make_trainer(data, tmp_path, filter_seen=False).predict(data[1]["test"])
    assert (everything.predictions[0] >= filtered).all()
    assert (everything.predictions[0] > filtered).any()


def test_predictions_are_of_the_size_of_the_users(data, tmp_path):
    output = make_trainer(data, tmp_path).predict(data[1]["test"])
    n_users = len(data[1]["test"])
    shapes = [(n_users,), (n_users,), (n_users, 10), (n_users,)]
    assert [part.shape for part in output.predictions] == shapes
    assert output.metrics["test_loss"] == pytest.approx(output.predictions[3].mean())
    assert output.label_ids.tolist() == data[1]["test"]["target_id"][:]


def gradients_of_one_step(data, folder, batch_size, accumulation):
    trainer = make_trainer(
        data,
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
    )
    grads = []
    trainer.model.get_input_embeddings().weight.register_post_accumulate_grad_hook(
        lambda weight: grads.append(weight.grad.clone())
    )
    trainer.train()
    return grads[-1]


def test_gradient_accumulation_equals_one_large_batch(data, tmp_path):
    whole = gradients_of_one_step(data, tmp_path / "a", 32, 1)
    parts = gradients_of_one_step(data, tmp_path / "b", 4, 8)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_the_best_checkpoint_is_found_by_ndcg(data, tmp_path):
    trainer = make_trainer(
        data,
        tmp_path,
        num_train_epochs=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@10",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    history = [e["eval_ndcg@10"] for e in trainer.state.log_history if "eval_ndcg@10" in e]
    assert trainer.state.best_metric == max(history)
    trainer.remove_callback(EarlyStoppingCallback)
    assert trainer.evaluate()["eval_ndcg@10"] == pytest.approx(max(history))


@pytest.mark.parametrize("loss_type", ["cross_entropy", "stratified"])
def test_resuming_gives_the_same_weights(data, loss_type, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "loss_type": loss_type}
    whole = make_trainer(data, tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(data, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_grouping_by_length_trains_and_evaluates(data, tmp_path):
    trainer = make_trainer(data, tmp_path, train_sampling_strategy="group_by_length", max_steps=2)
    trainer.train()
    assert "eval_ndcg@10" in trainer.evaluate()


def test_predictions_keep_the_order_of_users_when_training_groups_by_length(data, tmp_path):
    test = data[1]["test"]
    trainer = make_trainer(data, tmp_path, train_sampling_strategy="group_by_length")
    assert trainer.predict(test).label_ids.tolist() == test["target_id"][:]
    assert trainer.args.train_sampling_strategy == "group_by_length"


def test_most_popular_equals_a_model_that_scores_by_popularity(data, tmp_path):
    tokenizer, splits = data
    trainer = make_trainer(data, tmp_path)
    counts = torch.zeros(len(tokenizer))
    for row in splits["train"]:
        counts += torch.bincount(torch.tensor(row["item_ids"]), minlength=len(tokenizer))
    trainer.model.item_head = nn.Linear(16, len(tokenizer))
    trainer.model.item_head.weight.data.zero_()
    trainer.model.item_head.bias.data.copy_(counts)
    wanted = trainer.evaluate(splits["test"])
    metrics = most_popular_metrics(splits["train"], splits["test"], len(tokenizer) - 1, ks=[5, 10])
    for k in (5, 10):
        for name in ("ndcg", "hr", "mrr"):
            assert metrics[f"{name}@{k}"] == pytest.approx(wanted[f"eval_{name}@{k}"], abs=1e-6)


@pytest.mark.parametrize("loss_type", [None, "stratified"])
def test_a_memory_budget_reaches_the_loss_of_a_recommender(loss_type, tmp_path):
    model = RecommenderModel(
        RecommenderConfig(vocab_size=20, loss_type="rece", loss_kwargs={"n_rounds": 1})
    )
    args = LargeVocabTrainingArguments(
        output_dir=str(tmp_path), loss_type=loss_type, memory_budget="1GiB"
    )
    set_loss(model, args)
    own = {} if loss_type else {"n_rounds": 1}
    model.save_pretrained(tmp_path)
    config = RecommenderConfig.from_pretrained(tmp_path)
    assert config.loss_type == (loss_type or "rece")
    assert config.loss_kwargs == {**own, "memory_budget": "1GiB"}


# ------------------------------------------------------------------------------------- bad input


def test_two_memory_budgets_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"memory_budget='1GiB': loss_kwargs has one too"):
        LargeVocabTrainingArguments(
            output_dir=str(tmp_path),
            loss_type="rece",
            loss_kwargs={"memory_budget": "2GiB"},
            memory_budget="1GiB",
        )


def test_a_memory_budget_that_is_no_amount_is_refused_without_a_loss(tmp_path):
    with pytest.raises(ArgumentError, match="memory_budget='lots'"):
        LargeVocabTrainingArguments(output_dir=str(tmp_path), memory_budget="lots")


def test_knobs_need_a_loss(tmp_path):
    with pytest.raises(ArgumentError, match="loss_kwargs"):
        LargeVocabTrainingArguments(output_dir=str(tmp_path), loss_kwargs={"n_rounds": 1})


@pytest.mark.parametrize("text", ["{bad", "rounds", "[1]"])
def test_knobs_that_are_no_json_object_are_refused(text, tmp_path):
    with pytest.raises(ArgumentError, match=r"loss_kwargs=.*not a JSON object"):
        LargeVocabTrainingArguments(output_dir=str(tmp_path), loss_type="rece", loss_kwargs=text)


def test_an_unknown_loss_fails_before_training(tmp_path):
    with pytest.raises(ArgumentError, match="loss_type='recee'"):
        LargeVocabTrainingArguments(output_dir=str(tmp_path), loss_type="recee")


def test_cutoffs_are_positive(tmp_path):
    with pytest.raises(ArgumentError, match="ranking_ks"):
        RecommenderTrainingArguments(output_dir=str(tmp_path), ranking_ks=[0])


def test_histories_longer_than_the_model_reads_are_refused(data, tmp_path):
    with pytest.raises(ArgumentError, match=r"max_length=21: the model reads 20"):
        make_trainer(data, tmp_path, max_length=21)


def test_label_smoothing_is_refused(data, tmp_path):
    with pytest.raises(ArgumentError, match=r"label_smoothing_factor=0\.1: there are no logits"):
        make_trainer(data, tmp_path, label_smoothing_factor=0.1)


def test_a_model_that_is_none_of_transformers_is_refused(tmp_path):
    arguments = LargeVocabTrainingArguments(
        output_dir=str(tmp_path), loss_type="rece", use_cpu=True
    )
    with pytest.raises(ArgumentError, match=r"model='Linear'.*causal or masked LM"):
        LargeVocabTrainer(nn.Linear(2, 2), arguments)


@pytest.mark.parametrize(
    "settings",
    [{"prediction_loss_only": True}, {"compute_metrics": lambda p: {"users": len(p.label_ids)}}],
    ids=["loss only", "own metrics"],
)
def test_the_loss_of_evaluation_is_that_of_each_user_once(data, settings, tmp_path):
    wanted = make_trainer(data, tmp_path).evaluate()["eval_loss"]
    metrics = make_trainer(data, tmp_path, per_device_eval_batch_size=11, **settings).evaluate()
    assert metrics["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    assert metrics.get("eval_users", 70) == 70


@pytest.mark.parametrize(
    ("method", "argument"), [("evaluate", "eval_dataset"), ("predict", "test_dataset")]
)
def test_ranking_training_rows_is_refused(data, method, argument, tmp_path):
    trainer = make_trainer(data, tmp_path)
    with pytest.raises(ArgumentError, match=rf"{argument}=.*target_id"):
        getattr(trainer, method)(data[1]["train"])


# ------------------------------------------------------------------------------- several processes


def findings(folder, world):
    """Return metrics before training, metrics after it, and the sum of the weights."""
    trainer = make_trainer(
        make_data(),
        folder,
        per_device_eval_batch_size=11,  # 70 users: the last batch is uneven
        per_device_train_batch_size=16 // world,
        max_steps=3,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    assert trainer.args.world_size == world
    found = []
    for train in (lambda: None, trainer.train):
        train()
        metrics = trainer.evaluate()
        found.append({n: v for n, v in metrics.items() if "@" in n or n == "eval_loss"})
    return [*found, sum(float(p.detach().double().sum()) for p in trainer.model.parameters())]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("two")
    return findings_of_two_processes("tests.training.test_trainer", folder)


@pytest.mark.parametrize("moment", [0, 1], ids=["before", "after"])
def test_two_processes_rank_like_one(processes, moment, tmp_path):
    wanted = findings(tmp_path, 1)
    assert processes[0][moment] == pytest.approx(wanted[moment], rel=1e-5)


def test_two_processes_end_with_the_same_weights_after_an_evaluation(processes, tmp_path):
    wanted = findings(tmp_path, 1)
    assert processes[0][2] == processes[1][2] == pytest.approx(wanted[2], rel=1e-5)
