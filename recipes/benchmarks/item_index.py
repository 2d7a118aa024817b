"""Recall and speed of the approximate index beside exact search.

    python recipes/benchmarks/item_index.py --items 1000000

A recommender whose item vectors are made, not trained: 5,000 clusters with a falling spectrum and
lengths from .5 to 1.5 ("clustered"), or without any structure ("random"), the hardest case. Users
are 512 histories of items of one cluster. Recall is against exact search, on other users than those
that the effort is chosen by. Times are milliseconds a user, of 256 users at once and of one alone,
the least of three rounds; exact and approximate by turns in one run, on the same threads.
Writes results/item_index.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
from environment import environment
from rich.console import Console
from rich.table import Table

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig
from hf_rece.embeddings.output_terms import OutputTerms
from hf_rece.ops.topk import streamed_topk
from hf_rece.serving.item_index import ItemIndex

RESULTS = Path(__file__).parent / "results" / "item_index.json"
N_CLUSTERS, N_USERS, BATCH, K, ROUNDS = 5000, 512, 256, 10, 3


def make(kind: str, n_items: int, width: int) -> tuple[RecommenderModel, list[list[int]]]:
    torch.manual_seed(0)
    cluster = torch.randint(N_CLUSTERS, (n_items,))
    vectors = 0.7 * torch.randn(n_items, width)
    if kind == "clustered":
        vectors += torch.randn(N_CLUSTERS, width)[cluster]
        vectors *= torch.arange(1, width + 1) ** -0.5 * (torch.rand(n_items, 1) + 0.5)
    backbone = SASRecConfig(hidden_size=width, max_position_embeddings=50)
    model = RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=n_items + 1)).eval()
    with torch.no_grad():
        model.item_head.weight[1:] = vectors * 0.02 / vectors.std()
    model.tokenizer = ItemTokenizer(items=list(range(n_items)))
    order = cluster.argsort()
    starts = torch.randint(n_items - 10, (N_USERS,))
    return model, [order[start : start + 10].tolist() for start in starts.tolist()]


def milliseconds(search: Callable[[OutputTerms], Any], terms: OutputTerms, batch: int) -> float:
    """Return the time of one user, when `batch` are searched for at once."""
    n_batches = 1 if batch > 1 else 8
    parts = [OutputTerms(h, terms.rows, terms.bias) for h in terms.hidden.split(batch)[:n_batches]]
    started = time.perf_counter()
    for part in parts:
        search(part)
    return 1e3 * (time.perf_counter() - started) / (batch * n_batches)


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    model, histories = make(kind, args.items, args.width)
    started = time.perf_counter()
    index = ItemIndex.build(model, histories=histories, factory=args.factory)
    seconds = time.perf_counter() - started
    _, rows, bias = model.output_terms()
    terms = OutputTerms(model.user_vectors(histories), rows, bias)
    searches: dict[str, Callable[[OutputTerms], Any]] = {
        "exact": lambda part: streamed_topk(part.hidden, part.rows, K, bias=part.bias),
        "index": lambda part: index.search(part, K),
    }
    times: dict[str, dict[str, float]] = {"of_256": {}, "alone": {}}
    for name, batch in (("of_256", BATCH), ("alone", 1)):
        for _ in range(ROUNDS):
            for who, search in searches.items():
                spent = milliseconds(search, terms, batch)
                times[name][who] = min(times[name].get(who, spent), spent)
    return {
        "factory": index.settings.factory,
        "effort": index.settings.effort,
        "recall_at_10": index.settings.recall,
        "build_seconds": round(seconds, 1),
        "index_mib": round(len(faiss.serialize_index(index.index)) / 2**20, 1),
        "table_mib": round(args.items * args.width * 4 / 2**20, 1),
        **{
            f"{who}_ms_a_user_{name}": round(of[who], 4)
            for name, of in times.items()
            for who in searches
        },
        **{f"times_faster_{n}": round(of["exact"] / of["index"], 1) for n, of in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--factory", default=None)
    parser.add_argument("--kinds", nargs="+", default=["clustered", "random"])
    args = parser.parse_args()
    rows = {kind: measure(kind, args) for kind in args.kinds}
    table = Table(title=f"{args.items:,} items, D={args.width}")
    for column in ("", *rows):
        table.add_column(column, justify="right" if column else "left")
    for name in next(iter(rows.values())):
        table.add_row(name, *(str(row[name]) for row in rows.values()))
    Console().print(table)
    versions = {"faiss": faiss.__version__}
    record = {**environment(), **versions, "items": args.items, "width": args.width, "kinds": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
