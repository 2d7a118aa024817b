"""Fill the tables of README.md and recipes/README.md from results/.

    python recipes/benchmarks/fill_tables.py

A table stands between <!-- name --> and <!-- /name -->, name being a function below.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "recipes" / "README.md")
LOSSES = {
    "dense": "dense (torch)",
    "torch_default": "torch `F.linear_cross_entropy`, default",
    "torch_chunked": "the same with `LinearCrossEntropyOptions()`",
    "torch_chunked_256": "the same, 256 tokens a chunk",
    "cce_compile": "Cut Cross-Entropy, `torch_compile`",
    "cce_exact": "its own kernels, and Liger's",
    "oracle_rece": "RECE with all logits at once (our oracle of its program)",
    "oracle_sce": "SCE likewise",
    "cross_entropy": "**`cross_entropy`, exact**",
    "rece": "**`rece`**",
    "sce": "**`sce`**",
    "stratified": "**`stratified`**",
    "sampled_softmax": "**`sampled_softmax`**",
}
TRAININGS = {
    "rectools": "RecTools 0.19, softmax",
    "cross_entropy": "**`cross_entropy`, exact**",
    "stratified": "**`stratified`**",
    "rece": "**`rece`**",
    "sce": "**`sce`**",
}

ITEM_TABLES = {
    "dense": "dense",
    "qr_mult": 'quotient-remainder, "mult"',
    "qr_add": 'quotient-remainder, "add"',
    "qr_concat": 'quotient-remainder, "concat"',
    "codes": '8 codes, "concat"',
    "lma": "LMA, 8 keys",
    "hashing": "plain hashing (LMA, no keys)",
}
HEADS = {
    "dense": "dense (transformers)",
    "trl": "TRL, fused head",
    "liger": "Liger",
    "cce": "Cut Cross-Entropy",
    "cce_exact": "Cut Cross-Entropy, exact",
}
# Loss, table, and how processes hold it, of results/scale.json.
SCALES = {
    ("dense", "dense", "ddp"): "dense logits, DDP",
    ("cross_entropy", "dense", "ddp"): "`cross_entropy`, DDP",
    ("cross_entropy", "dense", "fsdp"): "`cross_entropy`, FSDP",
    ("cross_entropy", "dense", "vocab_parallel"): "`cross_entropy`, `vocab_parallel`",
    ("rece", "dense", "vocab_parallel"): "`rece`, `vocab_parallel`",
    ("sce", "dense", "vocab_parallel"): "`sce`, `vocab_parallel`",
    ("stratified", "dense", "vocab_parallel_64"): "`stratified`, `vocab_parallel_size=64`",
    ("stratified", "lma", "ddp"): "`stratified`, LMA table 16x, DDP",
}


def losses() -> Iterator[tuple[str, ...]]:
    """Yield head and rows: memory and time of loss and backward at two shapes."""
    small, large = (
        read(f"losses_{shape}_64.json")["losses"] for shape in ("4096_100000", "25600_1000000")
    )
    yield (
        "loss",
        "N=4,096, C=100,000: extra MiB",
        "time / dense",
        ("N=25,600, C=1,000,000: extra MiB"),
        "time / exact",
    )
    for name, label in LOSSES.items():
        yield (
            label,
            *memory_and_time(small, name, "dense"),
            *memory_and_time(large, name, "cross_entropy"),
        )


def memory_and_time(rows: dict[str, dict[str, Any]], name: str, other: str) -> tuple[str, str]:
    """Return extra MiB, and time over that of another; or why there is none."""
    row = rows.get(name, {"not_run": "not run"})
    if "not_run" in row:
        return row["not_run"], ""
    ratio = row["seconds"] / rows[other]["seconds"]
    return (
        f"{row['extra_peak_mib']:,.0f}",
        f"{ratio:.{2 if ratio >= 0.1 else 3 if ratio >= 0.01 else 4}f}",
    )


def training() -> Iterator[tuple[str, ...]]:
    """Yield head and rows: epochs of SASRec beside RecTools."""
    record = read("training.json")
    rows, peer = record["trainings"], record["trainings"]["rectools"]
    epochs = f"{record['epochs']} epoch{'s' * (record['epochs'] > 1)}"
    yield (
        *("training", "s an epoch", "ms a step", "times faster", "peak MiB", "of RecTools"),
        f"NDCG@10 after {epochs}",
    )
    for name, label in TRAININGS.items():
        row = rows[name]
        yield (
            label,
            f"{row['seconds_per_epoch']:.0f}",
            f"{1000 * row['seconds_per_step']:,.0f}",
            f"{peer['seconds_per_epoch'] / row['seconds_per_epoch']:.1f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['peak_mib'] / peer['peak_mib']:.2f}",
            f"{row['ndcg@10']:.4f}",
        )


def llm() -> Iterator[tuple[str, ...]]:
    """Yield head and rows: training steps of two language models under each head."""
    tiny, small = (read(f"llm_{name}.json")["heads"] for name in ("tiny_llama", "small_qwen3"))
    yield (
        *("head", "32,000 tokens, D=256: extra MiB", "time / dense"),
        *("151,936 tokens, D=512: extra MiB", "time / dense"),
    )
    for name in tiny:
        label = HEADS.get(name) or LOSSES[name]
        yield (
            label,
            *memory_and_time(tiny, name, "dense"),
            *memory_and_time(small, name, "dense"),
        )


def lmlosses() -> Iterator[tuple[str, ...]]:
    """Yield head and rows: memory and time of loss and backward at a language model's shape."""
    trained, frozen = (
        read(f"losses_2048_151936_896{kind}.json")["losses"] for kind in ("", "_frozen")
    )
    yield (
        *("loss", "trainable: extra MiB", "time / dense"),
        *("frozen: extra MiB", "time / exact"),
    )
    for name in trained:
        cells = memory_and_time(trained, name, "dense")
        others = memory_and_time(frozen, name, "cross_entropy") if name in frozen else ("", "")
        yield LOSSES[name], *cells, *others


def tables() -> Iterator[tuple[str, ...]]:
    """Yield head and rows: whole training steps over item tables of a sixteenth of the size."""
    large, small = (read(f"tables_4096_{n}_64.json")["runs"] for n in ("10000000", "100000"))
    large |= read("tables_4096_10000000_64_add.json")["runs"]
    yield (
        *("table, 16x", "C=10,000,000: state MiB", "fewer"),
        *("peak MiB, `stratified`", "peak MiB, `rece`"),
        *("C=100,000: time / dense, exact", "`rece`", "`sce`", "`stratified`"),
    )
    state = large["rece, dense"]["state_mib"]
    for name, label in ITEM_TABLES.items():
        own = large[f"rece, {name}"]["state_mib"]
        peaks = (large[f"{loss}, {name}"]["extra_peak_mib"] for loss in ("stratified", "rece"))
        ratios = (
            small[f"{loss}, {name}"]["seconds"] / small[f"{loss}, dense"]["seconds"]
            for loss in ("cross_entropy", "rece", "sce", "stratified")
        )
        yield (
            *(label, f"{own:,.0f}", f"{state / own:.1f}"),
            *(f"{peak:,.0f}" for peak in peaks),
            *(f"{ratio:.2f}" for ratio in ratios),
        )


def scale() -> Iterator[tuple[str, ...]]:
    """Yield head and rows: simulated memory and time of a step; in italics what does not fit."""
    record = read("scale.json")
    rows = [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]
    sizes = {
        (10**7, 8): "10 million items, 8 GPUs",
        (10**8, 64): "100 million, 64",
        (10**9, 1024): "a billion, 1,024",
    }
    yield "simulated: GB a GPU; seconds a step (sending)", *sizes.values()
    for of_row, label in SCALES.items():
        cells = []
        for size in sizes:
            wanted = (size[0], 64, size[1], *of_row)
            found = [row for row in rows if tuple(row.values())[: len(wanted)] == wanted]
            if not found:  # groups of as many processes are not to be had
                cells.append("")
                continue
            (row,) = found
            memory = f"{row['gb_per_rank']:,.{'0' if row['gb_per_rank'] >= 20 else '1'}f} GB"
            took = f"{row['step_seconds']:.2g} s ({row['message_seconds']:.2g})"
            cells.append(f"{memory}; {took}" if row["fits"] else f"*{memory}*")
        yield label, *cells


TABLES = {
    "losses": losses, "training": training, "lmlosses": lmlosses, "llm": llm, "tables": tables,
    "scale": scale,
}  # fmt: skip


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def markdown(rows: Iterator[tuple[str, ...]]) -> str:
    head = next(rows)
    lines = [head, ("---", *["--:"] * (len(head) - 1)), *rows]
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        .replace("| --- | ", "|---|")
        .replace("--: | ", "--:|")
        .replace("--: |", "--:|")
    )


def filled(page: str) -> str:
    """Return a page with its tables filled."""
    for name, table in TABLES.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if marks.search(page):
            page = marks.sub(
                lambda found, table=table: found[1] + markdown(table()) + found[2], page
            )
    return page


def main() -> None:
    for path in PAGES:
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
