"""Which stratified estimator suits the states of a language model: groups, hard sets, draws.

    python recipes/benchmarks/language_model.py ... --losses cross_entropy --save_model runs/llama
    python recipes/benchmarks/estimators_language_model.py --model runs/llama \
        --tokenizer gpt2_tokenizer.json --file wikitext2_valid.txt

Takes 2,048 tokens of held-out text. Every estimator scores 512 classes a token; its loss and
gradients are compared with the exact ones, over three draws. The estimators are written out on
dense logits here, because most of them are not in the library: what they share is the share of each
class in the estimated softmax. Writes results/estimators_language_model.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_rece.data.text import load_text, token_blocks
from hf_rece.training.pretrain import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "estimators_language_model.json"
N_TOKENS, N_DRAWS = 2048, 3


@dataclass(frozen=True)
class Estimator:
    """A variant of the stratified loss.

    Args:
        n_groups: groups of tokens.
        n_hard: classes a hard set.
        n_random: classes drawn for all the rest.
        centred: hash states less their mean.
        frequent: so many of the batch's likeliest classes are in every hard set.
        guided: draw in proportion to 1/2 uniform + 1/2 of the softmax at the mean state
            ("mean state") or of the batch's mean softmax; None for uniform blocks.
    """

    n_groups: int = 128
    n_hard: int = 256
    n_random: int = 256
    centred: bool = True
    frequent: int = 0
    guided: str | None = None


ESTIMATORS = {
    "stratified, defaults: 128 groups, 256 + 256": Estimator(),
    "32 groups": Estimator(n_groups=32),
    "512 groups": Estimator(n_groups=512),
    "not centred": Estimator(centred=False),
    "the 128 likeliest classes in every hard set": Estimator(frequent=128),
    "128 hard + 384 random": Estimator(n_hard=128, n_random=384),
    "384 hard + 128 random": Estimator(n_hard=384, n_random=128),
    "draws guided by the mean state": Estimator(guided="mean state"),
    "draws guided by the mean softmax": Estimator(guided="mean softmax"),
    "draws guided by the mean state, 512 groups": Estimator(guided="mean state", n_groups=512),
}


@dataclass(frozen=True)
class Exact:
    """The dense softmax of a batch: hidden (N, D), weight (C, D), labels (N,), shares (N, C)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    shares: Tensor
    label_loss: Tensor

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, labels: Tensor) -> "Exact":
        """Return what these states make of these rows."""
        logits = hidden @ weight.T
        shares = logits.softmax(1)
        own = shares[torch.arange(len(labels)), labels]
        return cls(hidden, weight, labels, shares, -own.log())

    def gradients(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of hidden and weight under estimated shares (N, C)."""
        residual = shares.clone()
        residual[torch.arange(len(self.labels)), self.labels] -= 1
        return residual @ self.weight, residual.T @ self.hidden


def states(model_folder: str, tokenizer_file: str, files: list[str]) -> tuple[Tensor, ...]:
    tokenizer = load_tokenizer(tokenizer_file)
    blocks = token_blocks(load_text(files), tokenizer, 128).shuffle(seed=0)
    ids = torch.tensor(blocks[: -(-N_TOKENS // 127)]["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, :-1]
    weight = model.get_output_embeddings().weight.detach()
    return hidden.flatten(0, 1)[:N_TOKENS], weight, ids[:, 1:].flatten()[:N_TOKENS]


def group_of_tokens(exact: Exact, estimator: Estimator) -> Tensor:
    centre = exact.hidden.mean(0) if estimator.centred else 0
    directions = torch.randn(estimator.n_groups, exact.hidden.shape[1])
    order = ((exact.hidden - centre) @ directions.T).argmax(1).argsort(stable=True)
    group = torch.empty_like(order)
    group[order] = torch.arange(len(order)) // -(-len(order) // estimator.n_groups)
    return group


def hard_mask(exact: Exact, estimator: Estimator) -> Tensor:
    """Return (N, C) bool: the group's hard set and the label."""
    group = group_of_tokens(exact, estimator)
    sums = torch.zeros(estimator.n_groups, exact.hidden.shape[1]).index_add_(0, group, exact.hidden)
    count = torch.bincount(group, minlength=estimator.n_groups).clamp(min=1)
    scores = (sums / count.unsqueeze(1)) @ exact.weight.T
    if estimator.frequent:
        scores[:, exact.shares.mean(0).topk(estimator.frequent).indices] = torch.inf
    hard = scores.topk(estimator.n_hard, dim=1).indices[group]
    mask = torch.zeros_like(exact.shares, dtype=torch.bool).scatter_(1, hard, True)
    return mask.scatter_(1, exact.labels.unsqueeze(1), True)


def uniform_draws(n_classes: int, mask: Tensor, n_random: int) -> tuple[Tensor, Tensor]:
    """Return classes (N, n_random) and weights: a random block each, weighted up to the rest."""
    n_blocks = -(-n_classes // n_random)
    padded = torch.nn.functional.pad(
        torch.randperm(n_classes), (0, n_blocks * n_random - n_classes), value=-1
    )
    classes = padded.view(n_random, n_blocks).T[torch.randperm(len(mask)) % n_blocks]
    met = (classes >= 0) & ~mask.gather(1, classes.clamp(min=0))
    rest = (~mask).sum(1, keepdim=True)
    weights = met * (rest / met.sum(1, keepdim=True).clamp(min=1))
    return classes.clamp(min=0), weights


def guided_draws(chance: Tensor, mask: Tensor, n_random: int) -> tuple[Tensor, Tensor]:
    """Return classes (N, n_random) and weights: priority sampling, a draw for eight tokens."""
    n_draws = len(mask) // 8
    best = (chance / torch.rand(n_draws, len(chance))).topk(n_random + 1, dim=1)
    classes = best.indices[:, :-1]
    weights = torch.maximum(chance[classes], best.values[:, -1:]) / chance[classes]
    own = torch.randperm(len(mask)) % n_draws
    return classes[own], weights[own] * ~mask.gather(1, classes[own])


def estimated_shares(exact: Exact, estimator: Estimator) -> Tensor:
    """Return (N, C): each class's estimated weight, in units of the exact sum of exponentials."""
    mask = hard_mask(exact, estimator)
    n_classes = len(exact.weight)
    if estimator.guided is None:
        classes, weights = uniform_draws(n_classes, mask, estimator.n_random)
    else:
        guide = {
            "mean state": (exact.hidden.mean(0) @ exact.weight.T).softmax(0),
            "mean softmax": exact.shares.mean(0),
        }[estimator.guided]
        classes, weights = guided_draws((guide + 1 / n_classes) / 2, mask, estimator.n_random)
    shares = exact.shares * mask
    return shares.scatter_add_(1, classes, weights * exact.shares.gather(1, classes))


def compare(exact: Exact, estimator: Estimator) -> dict[str, float]:
    wanted = exact.gradients(exact.shares)
    loss, cosines, mean_weight = 0.0, torch.zeros(2), torch.zeros_like(exact.weight)
    for draw in range(N_DRAWS):
        torch.manual_seed(draw)
        shares = estimated_shares(exact, estimator)
        total = shares.sum(1, keepdim=True)
        loss += float((total.log().squeeze(1) + exact.label_loss).mean()) / N_DRAWS
        found = exact.gradients(shares / total)
        cosines += torch.tensor([cosine(*pair) for pair in zip(found, wanted, strict=True)])
        mean_weight += found[1] / N_DRAWS
    hidden, weight = (cosines / N_DRAWS).tolist()
    return {
        "loss": loss,
        "cosine_grad_hidden": hidden,
        "cosine_grad_weight": weight,
        f"cosine_grad_weight_mean_of_{N_DRAWS}": cosine(mean_weight, wanted[1]),
    }


def cosine(left: Tensor, right: Tensor) -> float:
    return torch.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a trained causal LM")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--file", nargs="+", required=True, help="held-out text")
    args = parser.parse_args()
    exact = Exact.of(*states(args.model, args.tokenizer, args.file))
    exact_loss = float(exact.label_loss.mean())
    sharpest = exact.shares.sort(1, descending=True).values
    mass = {k: round(float(sharpest[:, :k].sum(1).mean()), 4) for k in (64, 256, 1024, 4096)}
    del sharpest
    norms = exact.hidden.norm(dim=1).mean(), exact.hidden.mean(0).norm()
    table = Table(title=f"{N_TOKENS} tokens, {len(exact.weight)} classes, loss {exact_loss:.3f}")
    for name in ("estimator", "loss", "cos grad_hidden", "cos grad_weight", "mean of draws"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    record = {}
    for name, estimator in ESTIMATORS.items():
        row = compare(exact, estimator)
        record[name] = {key: round(value, 5) for key, value in row.items()}
        table.add_row(name, f"{row['loss']:.3f}", *(f"{v:.4f}" for v in list(row.values())[1:]))
    Console(width=120).print(table)
    result = {
        **environment(),
        "tokens": N_TOKENS,
        "classes": len(exact.weight),
        "exact_loss": exact_loss,
        "mass_of_own_top": mass,
        "mean_norm_of_states": round(float(norms[0]), 3),
        "norm_of_mean_state": round(float(norms[1]), 3),
        "estimators": record,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
