"""Train on your own log, push to the Hub, load by id elsewhere, and recommend the same.

    python recipes/sequential_recommendation/share.py --hub_model_id me/shop --train_file log.csv \
        --user_column customer --item_column product --time_column bought_at

Takes the flags of `hf-rece train`; log in before with `hf auth login`. The model is loaded by
another process, in another folder, which knows nothing but its id.
"""

import json
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from hf_rece.cli import TrainDefaults, parse
from hf_rece.data.splits import HISTORY
from hf_rece.training.run import DataArguments, ModelArguments, train_recommender
from hf_rece.training.sparsity import SparsityArguments

ELSEWHERE = """
import json, sys
from hf_rece import RecommenderModel
model = RecommenderModel.from_pretrained(sys.argv[1])
answers = model.recommend(json.load(sys.stdin), k=5)
print(json.dumps([[[found.item, found.score] for found in answer] for answer in answers]))
"""


def recommend_elsewhere(repo_id, histories):
    """Return what a new process in an empty folder recommends, and the seconds that it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, repo_id],
            input=json.dumps(histories),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=folder,
        )
    return json.loads(done.stdout), time.perf_counter() - start


def main():
    words = [*sys.argv[1:], "--push_to_hub", "true", "--hub_strategy", "end"]
    types = (DataArguments, ModelArguments, TrainDefaults, SparsityArguments)
    data, model, training, sparsity = parse(types, words, "train")
    start = time.perf_counter()
    run = train_recommender(data, model, training, sparsity)
    seconds = time.perf_counter() - start

    items = run.model.tokenizer.convert_ids_to_items
    histories = [items(row[HISTORY]) for row in run.splits["test"].select(range(3))]
    here = run.model.recommend(histories, k=5)
    there, seconds_there = recommend_elsewhere(training.hub_model_id, histories)
    table = Table(title=f"{training.hub_model_id}: trained here, loaded elsewhere")
    for name in ("last items", "top 5 here", "top 5 there"):
        table.add_column(name)
    for history, answer, other in zip(histories, here, there, strict=True):
        table.add_row(
            " ".join(map(str, history[-3:])),
            " ".join(str(found.item) for found in answer),
            " ".join(str(item) for item, _ in other),
        )
    Console().print(table)
    same = [[[found.item, found.score] for found in answer] for answer in here] == there
    Console().print(
        f"{'identical' if same else 'DIFFERENT'} items and scores; trained, tested and pushed in "
        f"{seconds:.0f} s, loaded and answered in {seconds_there:.0f} s"
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
