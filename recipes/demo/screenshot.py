"""Train a recommender on a made-up shop, and take recommend.png and planner.png of its page.

    python recipes/demo/screenshot.py

Needs Chromium: apt-get install chromium.
"""

import random
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from playwright.sync_api import Page, sync_playwright

from hf_rece import (
    ItemTokenizer,
    RecommenderConfig,
    RecommenderModel,
    RecommenderTrainer,
    RecommenderTrainingArguments,
    SASRecConfig,
    leave_one_out_split,
)
from hf_rece.serving.demo import build_demo

HERE = Path(__file__).parent
# What people buy for something, in the order in which they tend to.
ERRANDS = [
    "coffee grinder, coffee beans, paper filters, milk frother, oat milk, espresso cups, descaler",
    "wheat flour, dry yeast, baking tin, dough scraper, proofing basket, rye flour, bread knife",
    "bicycle pump, inner tube, tyre levers, chain oil, brake pads, bell, rear light",
    "tomato seeds, potting soil, flower pots, watering can, tomato stakes, plant feed, secateurs",
    "wall filler, sandpaper, masking tape, paint roller, primer, white wall paint, dust sheet",
    "tent, sleeping bag, camping stove, gas canister, head torch, water filter, trail mix",
    "guitar strings, tuner, capo, plectrums, music stand, guitar strap, songbook",
    "watercolour set, round brush, sketchbook, masking fluid, flat brush, easel, varnish",
]


def shop_log(n_users: int = 500) -> tuple[pl.DataFrame, dict[str, str]]:
    """Return a log of users who run two errands each, and the titles of its items."""
    ids = count(1)
    titles = {f"B{next(ids):03d}": name for errand in ERRANDS for name in errand.split(", ")}
    items = list(titles)
    width = len(items) // len(ERRANDS)
    chance, rows = random.Random(0), []
    for user in range(n_users):
        bought = []
        for errand in chance.sample(range(len(ERRANDS)), 2):
            wanted = items[errand * width : (errand + 1) * width]
            bought += [item for item in wanted if chance.random() < 0.8]
        rows += [(f"U{user}", item, time) for time, item in enumerate(bought)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return log, {item: title.capitalize() for item, title in titles.items()}


def trained(log: pl.DataFrame) -> RecommenderModel:
    tokenizer = ItemTokenizer.from_interactions(log)
    config = RecommenderConfig(
        backbone=SASRecConfig(hidden_size=32, max_position_embeddings=20),
        vocab_size=len(tokenizer),
        loss_type="cross_entropy",
    )
    model = RecommenderModel(config)
    model.tokenizer = tokenizer
    with TemporaryDirectory() as folder:
        arguments = RecommenderTrainingArguments(
            output_dir=folder,
            num_train_epochs=20,
            per_device_train_batch_size=128,
            learning_rate=1e-2,
            max_length=20,
            use_cpu=True,
        )
        splits = leave_one_out_split(log, tokenizer)
        RecommenderTrainer(model, arguments, train_dataset=splits["train"]).train()
    return model


def photograph(page: Page, url: str) -> None:
    page.goto(url)
    search = page.get_by_label("Find one of")
    for words, name in (("grind", "Coffee grinder"), ("coffee bea", "Coffee beans")):
        search.fill(words)
        page.get_by_text("1 item matches").wait_for()
        search.press("Enter")
        page.get_by_role("button", name=f"Remove {name}").wait_for()
    search.press_sequentially("m")
    page.get_by_role("button", name="Masking tape").wait_for()
    page.screenshot(path=HERE / "recommend.png", full_page=True)
    page.get_by_role("tab", name="Memory planner").click()
    page.get_by_role("spinbutton", name="Classes").fill("1000000")
    page.get_by_role("spinbutton", name="Tokens").fill("25600")
    page.get_by_text("1,000,000 classes a token").first.wait_for()
    page.screenshot(path=HERE / "planner.png", full_page=True)


if __name__ == "__main__":
    log, titles = shop_log()
    demo = build_demo(trained(log), titles)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, footer_links=[])
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=options)
        photograph(browser.new_page(viewport={"width": 1100, "height": 860}), url)
        browser.close()
    demo.close()
