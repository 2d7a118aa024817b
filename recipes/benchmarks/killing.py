"""Jobs that write files, killed at random moments: what kills.py does beside training."""

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_rece import HfReceError, ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig
from hf_rece.data.prepare import prepare_log
from hf_rece.data.prepared import MANIFEST, open_prepared
from hf_rece.data.synthetic import generate_interactions
from hf_rece.serving.export import export_encoder
from hf_rece.serving.item_index import ItemIndex
from hf_rece.serving.user_files import recommend_parquet

N_ITEMS = 2000
Job = tuple[Callable[[], None], Callable[[], None]]


def make_model(seed: int = 0, loss: str = "cross_entropy", **knobs: Any) -> RecommenderModel:
    torch.manual_seed(seed)
    backbone = SASRecConfig(hidden_size=16, max_position_embeddings=12, dropout=0.2)
    config = RecommenderConfig(
        backbone=backbone, vocab_size=N_ITEMS + 1, loss_type=loss, loss_kwargs=knobs
    )
    model = RecommenderModel(config)
    model.tokenizer = ItemTokenizer(items=[f"item {i} of {seed}" for i in range(N_ITEMS)])
    return model


class JobFailedError(Exception):
    """A job ended by an error of its own."""


def forked(job: Callable[[], None], seconds: float | None = None) -> bool:
    """Run a job in a process of its own, kill it after some seconds; return whether it ended."""
    return forked_together([job], seconds)


def forked_together(
    jobs: Sequence[Callable[[], None]], seconds: float | None = None, apart: float = 0.0
) -> bool:
    """Run jobs, each in a process of its own; return whether all ended.

    After some seconds they are killed in their order. The first dies by itself: so many seconds
    pass until the others do, as a launcher needs some time to see it.

    Raises:
        JobFailedError: if a job ended by an error of its own before that.
    """
    children = [start(job) for job in jobs]
    end = time.perf_counter() + (3600 if seconds is None else seconds)
    left = list(children)
    while left and time.perf_counter() < end:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                if status:
                    kill(left)
                    raise JobFailedError
        time.sleep(0.001)
    if not left:
        return True
    kill(left[:1])
    time.sleep(apart)
    kill(left[1:])
    return False


def start(job: Callable[[], None]) -> int:
    """Run a job in a process of its own; return its id."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        status = 1
        try:
            job()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    return child


def kill(children: Sequence[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def saving(folder: Path) -> Job:
    """Save one of two models over the other; see which of them is there."""
    models = [make_model(seed) for seed in (1, 2)]

    def job() -> None:
        for model in models:
            model.save_pretrained(folder / "model")

    def state() -> None:
        found = RecommenderModel.from_pretrained(folder / "model")
        for model in models:
            pairs = zip(found.parameters(), model.parameters(), strict=True)
            same = all(torch.equal(one, other) for one, other in pairs)
            if same and found.tokenizer.items == model.tokenizer.items:  # type: ignore[union-attr]
                return
        raise ValueError("a mixture of two models")

    return job, state


def indexing(folder: Path) -> Job:
    """Index a model; see whether the index finds what exact search finds."""
    model, histories = make_model().eval(), [["item 3 of 0", "item 7 of 0"]]
    exact = model.recommend(histories, k=5)

    def job() -> None:
        ItemIndex.build(model, factory="IVF8,SQ8", target_recall=1.1).save(folder / "index")

    def state() -> None:
        found = model.recommend(histories, k=5, index=ItemIndex.load(folder / "index"))
        if [each.item for each in found[0]] != [each.item for each in exact[0]]:
            raise ValueError("the index finds other items")

    return job, state


def recommending(folder: Path) -> Job:
    """Recommend to users of a file; see whether all of them are answered."""
    model, users = make_model().eval(), folder / "users.parquet"
    histories = [[f"item {i % N_ITEMS} of 0"] for i in range(4000)]
    pq.write_table(pa.table({"user_id": list(range(4000)), "item_ids": histories}), users)

    def job() -> None:
        recommend_parquet(model, users, folder / "out.parquet", k=3, progress=False)

    def state() -> None:
        if pq.read_table(folder / "out.parquet").num_rows != 12000:
            raise ValueError("not all users")

    return job, state


def exporting(folder: Path) -> Job:
    """Export an encoder; see whether it gives the users' vectors."""
    model = make_model().eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, -1]

    def job() -> None:
        export_encoder(model, folder / "encoder.pt2")

    def state() -> None:
        graph = torch.export.load(folder / "encoder.pt2").module()
        torch.testing.assert_close(graph(ids, torch.ones_like(ids)), wanted)

    return job, state


JOBS = {
    "save_pretrained": saving,
    "index": indexing,
    "recommend": recommending,
    "export": exporting,
}


def kill_preparing(folder: Path, n_kills: int, draw: random.Random) -> dict[str, int]:
    """Kill the preparation of a log and go on, until it ends; its files must be the same ones.

    Polars has threads, which do not outlive a fork: only children work with it.
    """
    files = folder / "log"
    forked(partial(write_log, files))
    job = partial(prepare_log, str(files / "*.parquet"), split="temporal", n_shards=20)
    started = time.perf_counter()
    forked(partial(job, folder / "calm"))
    seconds = time.perf_counter() - started
    wanted = hashes(folder / "calm")
    rows = open_prepared(folder / "calm").manifest["interactions"]
    found = {"interactions": rows, "kills": 0, "runs": 0, "runs_not_bit_equal": 0}
    found |= {"runs_that_could_not_go_on": 0, "corrupt": 0}
    while found["kills"] < n_kills:
        output = folder / f"prepared-{found['runs']}"
        found["runs"] += 1
        try:
            while not forked(partial(job, output), draw.uniform(0, 0.7 * seconds)):
                found["kills"] += 1
                found["corrupt"] += (output / MANIFEST).exists() and not is_sound(output)
        except JobFailedError:
            found["runs_that_could_not_go_on"] += 1
            continue
        found["runs_not_bit_equal"] += hashes(output) != wanted
        shutil.rmtree(output)
    return found


def write_log(folder: Path) -> None:
    """Write a million and a half interactions as twelve files."""
    folder.mkdir()
    log = generate_interactions(130_000, 20_000).sort("timestamp", maintain_order=True)
    for number, part in enumerate(log.iter_slices(-(-len(log) // 12))):
        part.write_parquet(folder / f"{number:02d}.parquet")


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in paths}


def is_sound(folder: Path) -> bool:
    """Return whether what calls itself a prepared log is what was written."""
    try:
        open_prepared(folder).check()
    except HfReceError as error:
        print(f"prepare: {error}")
        return False
    return True


def kill_writing(folder: Path, name: str, n_kills: int, draw: random.Random) -> dict[str, int]:
    """Kill a job that goes on and on; what lies there must be whole, or refused by name."""
    job, state = JOBS[name](folder)
    started = time.perf_counter()
    forked(job)
    seconds = time.perf_counter() - started
    found = {"kills": 0, "whole": 0, "refused_by_name": 0, "corrupt": 0}

    def again_and_again() -> None:
        while True:
            job()

    while found["kills"] < n_kills:
        forked(again_and_again, draw.uniform(0, 2.5 * seconds))
        found["kills"] += 1
        try:
            state()
            found["whole"] += 1
        except HfReceError as error:
            print(f"{name}: {error}")
            found["refused_by_name"] += 1
        except (OSError, ValueError, RuntimeError, AssertionError, BadZipFile) as error:
            print(f"{name}: {type(error).__name__}: {error}")
            found["corrupt"] += 1
    return found
