"""How well each loss estimates the exact cross-entropy and its gradients, on a trained SASRec.

    python recipes/benchmarks/estimators.py amazon_beauty.parquet

Trains SASRec with exact cross-entropy, takes 2,048 labelled tokens of training users, and compares
loss and gradients of each estimator, at about 460 classes a token, with the exact ones.
Writes results/estimators.json.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import set_seed

from hf_rece.data.interactions import load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.losses import cross_entropy_loss, rece_loss, sce_loss, stratified_loss
from hf_rece.losses.options import Options, prepare, softmax_loss
from hf_rece.models.recommender import RecommenderModel
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.ops.plan import Plan
from hf_rece.ops.plans.stratified import stratified_plan
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.trainer import RecommenderTrainer

RESULTS = Path(__file__).parent / "results" / "estimators.json"
N_TOKENS, N_DRAWS, HALF = 2048, 5, 231
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def trained_states(log: str, epochs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (N, D), rows (C, D) and labels (N,) of a model trained here."""
    interactions = load_interactions(log)
    tokenizer = ItemTokenizer.from_interactions(interactions)
    splits = leave_one_out_split(interactions, tokenizer)
    set_seed(0)
    backbone = SASRecConfig(hidden_size=64, max_position_embeddings=50, dropout=0.5)
    model = RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=len(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = RecommenderTrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=256,
            learning_rate=3e-3,
            warmup_steps=100,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            use_cpu=True,
        )
        trainer = RecommenderTrainer(model, arguments, train_dataset=splits["train"])
        trainer.train()
    rows = [splits["train"][i] for i in range(N_TOKENS)]
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        hidden = model.eval().backbone(input_ids=batch["input_ids"]).last_hidden_state
    kept = batch["labels"] != -100
    some = torch.randperm(int(kept.sum()))[:N_TOKENS]
    return hidden[kept][some], model.item_head.weight.detach(), batch["labels"][kept][some]


def by_plan(make_plan: Callable[..., Plan]) -> Loss:
    """Return the softmax loss over a plan that no named loss has."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        problem = prepare(hidden, weight, labels, Options(excluded_ids=[0]))
        plan = make_plan(
            problem.hidden.detach(),
            problem.rows,
            problem.labels,
            bias=None,
            excluded_ids=problem.excluded_ids,
            tile_bytes=problem.tile_bytes,
            generator=None,
        )
        return softmax_loss(*problem.stream(plan)).mean()

    return loss


def hard_sets_only(*args: object, **options: object) -> Plan:
    plan = stratified_plan(*args, n_groups=128, n_hard=2 * HALF, n_random=1, **options)
    return replace(plan, grids=plan.grids[:1])


def blocks_without_weight(*args: object, **options: object) -> Plan:
    plan = stratified_plan(*args, n_groups=1, n_hard=1, n_random=2 * HALF, **options)
    return replace(plan, grids=(replace(plan.grids[1], token_log_weight=None),))


def estimators() -> dict[str, Loss]:
    def stratified(n_groups: int) -> Loss:
        knobs = {"n_groups": n_groups, "n_hard": HALF, "n_random": HALF, "excluded_ids": [0]}
        return lambda *inputs: stratified_loss(*inputs, **knobs)

    return {
        "RECE, 2 rounds, 1 extra chunk": lambda *inputs: rece_loss(*inputs, excluded_ids=[0]),
        "SCE, 256 classes a bucket": lambda *inputs: sce_loss(*inputs, excluded_ids=[0]),
        "random blocks, no weight": by_plan(blocks_without_weight),
        "group hard sets only, 128 groups": by_plan(hard_sets_only),
        "stratified, 128 groups": stratified(128),
        "stratified, 512 groups": stratified(512),
        "oracle: each token its own group": stratified(N_TOKENS),
    }


def loss_and_grads(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    value = loss(hidden, weight, inputs[2])
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def cosine(left: Tensor, right: Tensor) -> float:
    return torch.cosine_similarity(left.flatten(), right.flatten(), dim=0).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="amazon_beauty.parquet")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    inputs = trained_states(args.log, args.epochs)
    exact = loss_and_grads(lambda *i: cross_entropy_loss(*i, excluded_ids=[0]), inputs)
    table = Table(title=f"{N_TOKENS} tokens, {len(inputs[1])} classes, exact loss {exact[0]:.2f}")
    for name in ("estimator", "loss", "cos grad_hidden", "cos grad_weight", "mean of 5: weight"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    record = {}
    for name, loss in estimators().items():
        draws = [loss_and_grads(loss, inputs) for _ in range(N_DRAWS)]
        mean_grad = torch.stack([draw[2] for draw in draws]).mean(0)
        row = {
            "loss": sum(draw[0].item() for draw in draws) / N_DRAWS,
            "cosine_grad_hidden": sum(cosine(draw[1], exact[1]) for draw in draws) / N_DRAWS,
            "cosine_grad_weight": sum(cosine(draw[2], exact[2]) for draw in draws) / N_DRAWS,
            "cosine_grad_weight_mean_of_5": cosine(mean_grad, exact[2]),
        }
        record[name] = {key: round(value, 4) for key, value in row.items()}
        table.add_row(name, f"{row['loss']:.2f}", *(f"{v:.4f}" for v in list(row.values())[1:]))
    Console().print(table)
    shape = {"tokens": N_TOKENS, "classes": len(inputs[1]), "epochs": args.epochs}
    result = {**environment(), **shape, "exact_loss": exact[0].item(), "estimators": record}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
