"""Prepare a log that is larger than a machine: what `hf-rece prepare` writes, written by Spark.

    python recipes/sequential_recommendation/prepare_spark.py \
        --train_file 's3a://shop/log/*.parquet' --output_dir /shared/prepared \
        --user_column customer --item_column product --time_column bought_at

Needs pyspark 4 and Java 17; on a cluster, spark-submit it with hf_rece installed on all executors.
The log is Parquet; output_dir is a folder that driver and executors share. Spark filters, counts
and brings each shard's users together; an executor holds a shard in memory, cuts it as prepare_log
does and writes it with the same function, so the files are the same, byte by byte. Killed, the same
command begins anew.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console

from hf_rece.data.interactions import ITEM, TIME, USER
from hf_rece.data.prepare import save_tokenizer
from hf_rece.data.prepared import (
    DATA,
    MANIFEST,
    UNFINISHED,
    is_prepared,
    shard_path,
    write_manifest,
)
from hf_rece.data.shards import Histories, write_splits
from hf_rece.data.splits import split_protocol
from hf_rece.errors import DataError


def read(spark: SparkSession, args: argparse.Namespace) -> DataFrame:
    """Return user, item, time and place in the log, which decides between equal times.

    Raises:
        DataError: for an empty log, or missing values.
    """
    names = {USER: args.user_column, ITEM: args.item_column, TIME: args.time_column}
    log = spark.read.parquet(args.train_file).select(
        *(F.col(name).alias(role) for role, name in names.items()),
        F.col("_metadata.file_path").alias("file"),
        F.col("_metadata.row_index").alias("row"),
    )
    check_values(log, names)
    return log


def check_values(log: DataFrame, columns: dict[str, str]) -> None:
    """Refuse an empty log and missing values, which joins would leave out without a word.

    Raises:
        DataError: as prepare_log.
    """
    types = dict(log.dtypes)
    missing = {
        role: F.isnull(role) | F.isnan(role)
        if types[role] in ("float", "double")
        else F.isnull(role)
        for role in columns
    }
    counts = [F.count_if(is_missing).alias(role) for role, is_missing in missing.items()]
    found = log.select(F.count("*").alias("rows"), *counts).first()
    if not found["rows"]:
        raise DataError("the log", "it is empty", "Pass one with at least one interaction")
    for role, column in columns.items():
        if found[role]:
            raise DataError(
                f"the log, column {column!r}",
                f"{found[role]} of {found['rows']} values are missing",
                "Drop or fill these rows",
            )


def begin(output: Path) -> None:
    """Make a folder ready; what a run that was killed left there goes.

    Raises:
        DataError: if it holds anything else, or a finished log.
    """
    if (output / MANIFEST).exists():
        raise DataError(str(output), "holds a prepared log", "Pass another output_dir")
    if output.exists() and not is_prepared(output) and any(output.iterdir()):
        raise DataError(str(output), "not empty, and not a prepared log", "Pass another output_dir")
    (output / UNFINISHED).mkdir(parents=True, exist_ok=True)
    if (output / DATA).exists():
        shutil.rmtree(output / DATA)
    (output / DATA).mkdir()


def asked_for(args: argparse.Namespace) -> dict[str, object]:
    """Return what prepared.json says of the command: no folder, and no key of a bucket."""
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    file = args.train_file.rpartition("/")[2].partition("?")[0]
    return {"by": Path(__file__).name, **settings, "train_file": file}


def k_core(log: DataFrame, min_user: int, min_item: int) -> DataFrame:
    """Drop rare users and items until all that remain meet both minima."""
    before, rows = -1, log.count()
    while rows != before:
        for column, minimum in ((USER, min_user), (ITEM, min_item)):
            frequent = log.groupBy(column).count().filter(F.col("count") >= minimum)
            log = log.join(frequent, column, "left_semi")
        log = log.localCheckpoint()  # or the plan would grow with each round
        before, rows = rows, log.count()
    return log


def shard_writer(folder: str, n_shards: int, point: float | None):
    """Return what writes the rows of a shard, and says how many users they are of."""

    def write(table: pa.Table) -> pa.Table:
        shard = table["shard"][0].as_py()
        users = (
            pl.DataFrame(table)
            .sort(USER, TIME, "file", "row")
            .group_by(USER, maintain_order=True)
            .agg("token", pl.last(TIME))
        )
        write_splits(Path(folder), shard, n_shards, histories(users, point))
        return pa.table({"users": pa.array([len(users)], pa.int64())})

    return write


def histories(users: pl.DataFrame, point: float | None) -> Histories:
    """Return rows of user_id, token (lists) and timestamp (the last) in the form of a shard."""
    lengths = users["token"].list.len().to_numpy().astype(np.int64)
    return Histories(
        users=users.to_arrow(compat_level=pl.CompatLevel.oldest())[USER].combine_chunks(),
        tokens=users["token"].explode().drop_nulls().to_numpy().astype(np.int32),
        starts=lengths.cumsum() - lengths,
        lengths=lengths,
        is_late=None if point is None else users[TIME].to_numpy() > point,
    )


def prepare(spark: SparkSession, args: argparse.Namespace) -> None:
    output = Path(args.output_dir)
    begin(output)
    log = k_core(read(spark, args), args.min_user_interactions, args.min_item_interactions)
    interactions = log.count()
    quantile = args.quantile if args.split == "temporal" else None
    point = None
    if quantile is not None:
        place = int((interactions - 1) * quantile)
        point = log.select(TIME).orderBy(TIME).offset(place).first()[0]

    counts = log.groupBy(ITEM).count().orderBy(F.desc("count"), ITEM)
    items = counts.select(ITEM).toArrow()[ITEM].to_pylist()
    tokenizer = save_tokenizer(output, items)
    tokens = spark.createDataFrame(list(zip(items, range(1, len(items) + 1), strict=True)))
    tokens = tokens.toDF(ITEM, "token")

    n_shards = args.n_shards or -(-interactions // (1 << 22))
    shard = F.crc32(F.col(USER).cast("string").cast("binary")) % n_shards
    rows = log.join(tokens, ITEM).select("token", USER, TIME, "file", "row", shard.alias("shard"))
    write = shard_writer(str(output.resolve()), n_shards, point)
    written = rows.groupBy("shard").applyInArrow(write, "users long")
    users = written.agg(F.sum("users")).first()[0]
    nobody = pl.DataFrame(rows.filter("false").toArrow()).with_columns(token=pl.lit([]))
    for empty in range(n_shards):
        if not shard_path(output, "test", empty, n_shards).exists():
            write_splits(output, empty, n_shards, histories(nobody, None))
    prepared = write_manifest(
        output,
        n_shards,
        protocol=split_protocol(quantile),
        users=users,
        tokenizer=tokenizer,
        interactions=interactions,
        asked_for=asked_for(args),
    )
    shutil.rmtree(output / UNFINISHED)
    Console().print(prepared.description, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--user_column", default=USER)
    parser.add_argument("--item_column", default=ITEM)
    parser.add_argument("--time_column", default=TIME)
    parser.add_argument("--min_user_interactions", type=int, default=3)
    parser.add_argument("--min_item_interactions", type=int, default=1)
    parser.add_argument("--split", choices=["leave_one_out", "temporal"], default="leave_one_out")
    parser.add_argument("--quantile", type=float, default=0.95)
    parser.add_argument("--n_shards", type=int)
    args = parser.parse_args()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    prepare(SparkSession.builder.appName("hf_rece").getOrCreate(), args)


if __name__ == "__main__":
    main()
