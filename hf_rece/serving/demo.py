"""A page to look at: a recommender's answers to histories, and the planner of losses.

Needs the extra `demo`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import gradio
from rich.console import Console

from hf_rece.data.item_tokenizer import Item
from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.serving.catalogue import Catalogue, read_titles
from hf_rece.serving.page import fill, panel
from hf_rece.serving.planner_page import planner
from hf_rece.serving.recommender_page import recommender


@dataclass
class DemoArguments:
    """What the page shows, and where it is served."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a saved recommender; the planner alone without."},
    )
    item_titles: str | None = field(
        default=None, metadata={"help": "CSV or Parquet file with columns item_id and title."}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to serve at; 0.0.0.0 for all networks."}
    )
    port: int = field(default=7860, metadata={"help": "Port to serve at."})

    def __post_init__(self) -> None:
        if self.item_titles and not self.model_name_or_path:
            raise ArgumentError(
                "item_titles", self.item_titles, "there is no model", "Pass model_name_or_path too"
            )


def serve_demo(arguments: DemoArguments) -> None:
    """Serve the page until interrupted.

    Raises:
        ArgumentError: if the port is taken, or the address is not this machine's.
        DataError: see read_titles.
    """
    check_address(arguments.host, arguments.port)
    model, titles = None, None
    if arguments.model_name_or_path:
        model = RecommenderModel.from_pretrained(arguments.model_name_or_path)
    if model and arguments.item_titles:
        titles = read_titles(arguments.item_titles, model.own_tokenizer().items)
    demo = build_demo(model, titles)
    Console().print(f"http://{arguments.host}:{arguments.port} until Ctrl+C", highlight=False)
    demo.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=False,
        quiet=True,
        footer_links=["settings"],
        run_history=False,
    )


def check_address(host: str, port: int) -> None:
    """Raise ArgumentError unless a server can listen at `host` and `port`."""
    if not 1 <= port <= 65535:
        raise ArgumentError("port", port, "no port", "Pass a number from 1 to 65535")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ArgumentError("port", port, "in use", "Pass another port") from None
        reason = f"nothing can be served there: {error.strerror}"
        raise ArgumentError("host", host, reason, "Pass an address of this machine") from None


def build_demo(
    model: RecommenderModel | None = None, titles: Mapping[Item, str] | None = None
) -> gradio.Blocks:
    """Return the page: recommendations of a model, and the planner of losses.

    Items are searched for on this side, so that a catalogue of any size may be shown. Nothing is
    sent to Gradio's makers, and nothing is fetched from elsewhere.

    Args:
        model: with its tokenizer; None for the planner alone.
        titles: of items, by item id; items without go by their id.

    Raises:
        ArgumentError: if the model has no tokenizer.

    Example:
        build_demo(RecommenderModel.from_pretrained("user/shop")).launch()
    """
    demo = gradio.Blocks(title="hf_rece", analytics_enabled=False)
    with demo:
        panel(fill("header.html"), container=False)
        if model is None:
            planner()
            return demo
        with gradio.Tab("Recommend"):
            recommender(model, Catalogue.of(model.own_tokenizer().items, titles))
        with gradio.Tab("Memory planner"):
            planner()
    return demo
