"""The encoder of a recommender as a graph that runs without this package."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_rece.errors import ArgumentError, HfReceError
from hf_rece.files import complete_files
from hf_rece.models.item_tables import COMPRESSED
from hf_rece.models.recommender import RecommenderModel

_TOLERANCE = 1e-4
_SHAPE, _OTHER_SHAPE = (2, 6), (3, 4)


class UserEncoder(nn.Module):
    """From padded histories to the vectors that item vectors are multiplied with.

    Args:
        model: RecommenderModel; its parameters are shared.
    """

    def __init__(self, model: RecommenderModel) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.table: Any = model.get_input_embeddings()
        if isinstance(self.table, COMPRESSED):
            # Hash functions are made on first use: outside of the graph, as constants.
            self.table.rows(torch.zeros(1, dtype=torch.long, device=model.device))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the state (B, D) after the last item of each history.

        Args:
            input_ids: (B, T) int64 token ids, padded on either side.
            attention_mask: (B, T) int64, 1 at items and 0 at padding.
        """
        batch, length = input_ids.shape
        place = torch.arange(length, device=input_ids.device).unsqueeze(0)
        # Items to the front: later positions are never attended to, so no mask is needed.
        first = attention_mask.argmax(1, keepdim=True)
        ids = input_ids.gather(1, (place + first).clamp(max=length - 1))
        if isinstance(self.table, COMPRESSED):
            inputs = {"inputs_embeds": self.table.rows(ids.reshape(-1)).view(batch, length, -1)}
        else:
            inputs = {"inputs_embeds": self.table(ids)}
        hidden = self.backbone(**inputs, position_ids=place.expand(batch, length)).last_hidden_state
        last = attention_mask.sum(1) - 1
        states: Tensor = hidden[torch.arange(batch, device=hidden.device), last]
        return states


def export_encoder(model: RecommenderModel, path: str | Path) -> None:
    """Write the encoder: input_ids and attention_mask (B, T) int64 in, user vectors (B, D) out.

    Batch and length may vary; a backbone with a longest history has that as its limit. Token ids
    are those of items.json beside the model: an item's place in the list, counted from 1, and 0 is
    padding, on either side. Scores are inner products with model.item_vectors(), plus the item's
    bias where the model has one. The graph computes in float32.

    Args:
        model: with any backbone that torch can export.
        path: ends with .pt2 for torch.export.load, or with .onnx for ONNX runtimes.

    Raises:
        ArgumentError: for another ending, a backbone that cannot be exported or whose graph
            computes something else, an adapter on the output layer, or without the extra `onnx`.
        WriteError: if the file cannot be written; one that was there before stays.
    """
    path = Path(path)
    targets: dict[str, Callable[..., None]] = {".pt2": _save_program, ".onnx": _save_onnx}
    if path.suffix not in targets:
        raise ArgumentError(
            "path", path.name, "no such target", "Pass a name that ends with .pt2 or .onnx"
        )
    if model.output_terms().rows.width != model.config.hidden_size:
        raise ArgumentError(
            "model",
            type(model.item_head).__name__,
            "its output layer does more than multiply states with rows",
            "Merge the adapter first",
        )
    name = getattr(model.config.backbone, "model_type", type(model.backbone).__name__)
    was_training = model.training
    encoder = UserEncoder(model).eval()
    try:
        with (
            complete_files(path.parent, path.name) as folder,
            torch.no_grad(),
            _quietly(),
        ):
            targets[path.suffix](encoder, model, folder / path.name)
    except HfReceError:
        raise
    except Exception as error:  # torch raises many kinds, none of them documented
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:200] if lines else type(error).__name__
        raise ArgumentError(
            "backbone",
            name,
            f"torch cannot export it to {path.suffix}: {reason}",
            "Try the other of .pt2 and .onnx, or a sasrec, gpt2 or llama backbone",
        ) from error
    finally:
        model.train(was_training)


def _program(encoder: UserEncoder, model: RecommenderModel) -> torch.export.ExportedProgram:
    """Return the exported graph, after checking that it computes what the encoder computes."""
    longest = model.config.longest_history
    limit = {} if longest is None else {"max": longest}
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", **limit)
    shape = {0: batch, 1: length}
    program = torch.export.export(
        encoder, _example(model, *_SHAPE), dynamic_shapes=(shape, shape), strict=False
    )
    other = _example(model, *_OTHER_SHAPE)
    wrong = (program.module()(*other) - encoder(*other)).abs().max()
    if not float(wrong) <= _TOLERANCE:
        raise RuntimeError(f"the graph's answers are off by {float(wrong):.2g}")
    return program


def _save_program(encoder: UserEncoder, model: RecommenderModel, path: Path) -> None:
    torch.export.save(_program(encoder, model), path)


def _save_onnx(encoder: UserEncoder, model: RecommenderModel, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ArgumentError(
            "path", path.name, f"{error.name} is not installed", 'pip install "hf_rece[onnx]"'
        ) from None
    program = _program(encoder, model)
    names: Any = {
        "input_names": ["input_ids", "attention_mask"],
        "output_names": ["user_vectors"],
    }
    exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    if exported is None:
        raise RuntimeError("torch.onnx gave nothing back")
    exported.save(str(path))


def _example(model: RecommenderModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask (B, T) with padding on the right and on the left."""
    n_tokens = model.config.vocab_size
    ids = torch.arange(batch * length, device=model.device).view(batch, length) % (n_tokens - 1) + 1
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    mask[1, 0] = 0
    return ids * mask, mask


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's remarks on its own tracing from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
