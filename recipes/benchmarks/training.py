"""Train SASRec with our losses and with RecTools, same log and network: epoch time, memory, NDCG.

    python -m venv .venv_rectools
    .venv_rectools/bin/pip install "rectools[torch]==0.19.0" torch==2.13.0
    python recipes/benchmarks/training.py amazon_beauty.parquet --epochs 10 \
        --rectools_python .venv_rectools/bin/python

D=64, 2 blocks, 2 heads, feed-forward of D, length 50, batches of 128, Adam (.9, .98) at a constant
1e-3, dropout .2. This process reads and splits the log, once; each training runs in a fresh one
(training_hf_rece.py, training_rectools.py), which loads the split: ours from Arrow files, RecTools
from arrays, as each takes it. Peak is the largest resident size of that process from its start to
the end of training, interpreter, libraries and split included. An epoch is measured as it runs, the
making of its batches included; a step from when its batch is there until the weights have changed,
the median of all. NDCG@10 is hf_rece's, for both: full ranking, seen items filtered, the last item
of each user; RecTools' lists of ten are ranked by it.
Writes results/training.json, or with --max_users results/training_USERS.json.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from datasets import DatasetDict
from environment import environment
from measuring import Row, in_fresh_process
from rich.console import Console
from rich.table import Table

from hf_rece.data.interactions import USER, load_interactions
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.metrics.ranking import ndcg_at_k

RESULTS = Path(__file__).parent / "results"
PEER = "rectools"
CONTENDERS = (PEER, "cross_entropy", "stratified", "rece", "sce")
SETTINGS = {"width": 64, "blocks": 2, "heads": 2, "max_length": 50, "batch_size": 128,
            "learning_rate": 1e-3, "dropout": 0.2}  # fmt: skip


def split_log(log: str, max_users: int | None) -> tuple[ItemTokenizer, DatasetDict]:
    interactions = load_interactions(log)
    if max_users:
        users = interactions[USER].unique(maintain_order=True).head(max_users)
        interactions = interactions.filter(pl.col(USER).is_in(users.implode()))
    tokenizer = ItemTokenizer.from_interactions(interactions)
    return tokenizer, leave_one_out_split(interactions, tokenizer)


def write_split(splits: DatasetDict, folder: Path) -> None:
    """Write the split twice: as Arrow files, and as arrays of users and items."""
    splits.save_to_disk(str(folder / "split"))
    columns = {}
    for part in ("train", "test"):
        rows = splits[part].to_polars().select("user_id", "item_ids").explode("item_ids")
        columns[f"{part}_users"] = rows["user_id"].to_numpy()
        columns[f"{part}_items"] = rows["item_ids"].to_numpy()
    np.savez(folder / "split.npz", **columns)


def train(args: argparse.Namespace, name: str, folder: Path, vocab_size: int) -> Row:
    """Return what one training took, from the split in `folder`."""
    own = {field: getattr(args, field) for field in ("epochs", "seed", "threads")}
    script, python = "training_rectools.py", args.rectools_python
    if name != PEER:
        script, python = "training_hf_rece.py", sys.executable
        own |= {"loss_type": name, "vocab_size": vocab_size}
    words = [str(Path(__file__).with_name(script)), str(folder)]
    for field, value in {**own, **SETTINGS}.items():
        words += [f"--{field}", str(value)]
    row = in_fresh_process(words, args.timeout, python=python)
    if name == PEER and "No module named" in row.get("not_run", ""):
        return {"not_run": "not installed: see the head of training.py, --rectools_python"}
    return row


def ndcg_of_lists(users: np.ndarray, items: np.ndarray, splits: DatasetDict) -> float:
    """Return NDCG@10 of lists of ten, best first: a target outside its list has rank eleven."""
    lists: dict[int, list[int]] = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        lists.setdefault(user, []).append(item)
    greater = []
    for user, target in zip(splits["test"]["user_id"], splits["test"]["target_id"], strict=True):
        found = lists.get(user, [])
        greater.append(found.index(target) if target in found else 10)
    return round(ndcg_at_k(greater, [0] * len(greater), 10), 5)


def show(rows: dict[str, Row], title: str) -> None:
    table = Table(title=title)
    for name in ("training", "s/epoch", "s/step", "times faster", "peak MiB", "of RecTools",
                 "NDCG@10"):  # fmt: skip
        table.add_column(name, justify="left" if name == "training" else "right")
    peer = rows.get(PEER, {})
    for name, row in rows.items():
        if "not_run" in row:
            table.add_row(name, row["not_run"])
            continue
        if "peak_mib" in peer:
            row["times_faster"] = round(peer["seconds_per_epoch"] / row["seconds_per_epoch"], 2)
            row["share_of_peak"] = round(row["peak_mib"] / peer["peak_mib"], 3)
        table.add_row(
            name, f"{row['seconds_per_epoch']:.1f}", f"{row['seconds_per_step']:.3f}",
            str(row.get("times_faster", "")),
            f"{row['peak_mib']:,.0f}", str(row.get("share_of_peak", "")), f"{row['ndcg@10']:.4f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="amazon_beauty.parquet")
    for name, value in (("epochs", 10), ("threads", 2), ("seed", 0), ("max_users", None)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rectools_python", default=sys.executable)
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds a training")
    parser.add_argument("--suffix", default="", help="of the name of the results")
    args = parser.parse_args()
    tokenizer, splits = split_log(args.log, args.max_users)
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_split(splits, folder)
        for name in args.contenders:
            rows[name] = train(args, name, folder, len(tokenizer))
            if name == PEER and "not_run" not in rows[name]:
                found = np.load(folder / "recommended.npz")
                rows[name]["ndcg@10"] = ndcg_of_lists(found["user_id"], found["item_id"], splits)
            print(name, rows[name], flush=True)
    n_users = len(splits["test"])
    show(rows, f"SASRec, {n_users:,} users, {args.epochs} epochs, {args.threads} threads")
    record = {**environment(), "threads": args.threads, "log": Path(args.log).name,
              "users": n_users, "epochs": args.epochs, "seed": args.seed,
              "settings": SETTINGS, "trainings": rows}  # fmt: skip
    suffix = (f"_{args.max_users}" if args.max_users else "") + args.suffix
    (RESULTS / f"training{suffix}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
