"""Prepare a log that is larger than a machine: what `hf-rece prepare` writes, written by Spark.

    python recipes/sequential_recommendation/prepare_spark.py \
        --train_file 's3a://shop/log/*.parquet' --output_dir /shared/prepared \
        --user_column customer --item_column product --time_column bought_at

Needs pyspark 4 and Java 17; on a cluster, spark-submit it with hf_rece installed on all executors.
The log is Parquet; output_dir is a folder that driver and executors share. Spark filters, counts
and brings each shard's users together; an executor holds a shard in memory, cuts it as prepare_log
does and writes it with the same function, so the files are the same, byte by byte.
"""

import argparse
import os
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
from hf_rece.data.prepared import DATA, shard_path, write_manifest
from hf_rece.data.shards import Histories, write_splits
from hf_rece.data.splits import split_protocol


def read(spark: SparkSession, args: argparse.Namespace) -> DataFrame:
    """Return user, item, time and place in the log, which decides between equal times."""
    names = {USER: args.user_column, ITEM: args.item_column, TIME: args.time_column}
    return spark.read.parquet(args.train_file).select(
        *(F.col(name).alias(role) for role, name in names.items()),
        F.col("_metadata.file_path").alias("file"),
        F.col("_metadata.row_index").alias("row"),
    )


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
    log = k_core(read(spark, args), args.min_user_interactions, args.min_item_interactions)
    interactions = log.count()
    quantile = args.quantile if args.split == "temporal" else None
    point = None
    if quantile is not None:
        place = int((interactions - 1) * quantile)
        point = log.select(TIME).orderBy(TIME).offset(place).first()[0]

    counts = log.groupBy(ITEM).count().orderBy(F.desc("count"), ITEM)
    items = counts.select(ITEM).toArrow()[ITEM].to_pylist()
    output = Path(args.output_dir)
    (output / DATA).mkdir(parents=True)
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
        asked_for={"by": Path(__file__).name, **vars(args)},
    )
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
