"""The model card: a README made of what is known about a model, and kept up to date."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_rece.errors import DataError
from hf_rece.files import write_text

README = "README.md"
_MARK = "<!-- Written by hf_rece, and updated as long as nobody edits it. {digest} -->"
_MARKED = re.compile(re.escape(_MARK).replace(re.escape("{digest}"), "([0-9a-f]{16})") + r"\s*$")
_METADATA = re.compile(r"^---\s*\n.*?\n---\s*\n", re.DOTALL)

PAPERS = {
    "sasrec": (
        "W.-C. Kang, J. McAuley. Self-Attentive Sequential Recommendation. 2018.",
        "1808.09781",
    ),
    "rece": (
        "D. Gusak, G. Mezentsev, I. Oseledets, E. Frolov. RECE: Reduced Cross-Entropy Loss for "
        "Large-Catalogue Sequential Recommenders. 2024.",
        "2408.02354",
    ),
    "sce": (
        "G. Mezentsev, D. Gusak, I. Oseledets, E. Frolov. Scalable Cross-Entropy Loss for "
        "Sequential Recommendations with Large Item Catalogs. 2024.",
        "2409.18721",
    ),
    "gbce": (
        "A. Petrov, C. Macdonald. gSASRec: Reducing Overconfidence in Sequential Recommendation "
        "Trained with Negative Sampling. 2023.",
        "2308.07192",
    ),
    "sampled_softmax": (
        "A. Klenitskiy, A. Vasilev. Turning Dross Into Gold Loss: is BERT4Rec really better than "
        "SASRec? 2023.",
        "2309.07602",
    ),
    "compositional": (
        "H.-J. M. Shi, D. Mudigere, M. Naumov, J. Yang. Compositional Embeddings Using "
        "Complementary Partitions for Memory-Efficient Recommendation Systems. 2019.",
        "1909.02107",
    ),
    "codes": (
        "A. Petrov, C. Macdonald. RecJPQ: Training Large-Catalogue Sequential Recommenders. 2024.",
        "2312.06165",
    ),
    "lma": (
        "A. Desai, Y. Pan, K. Sun, L. Chou, A. Shrivastava. Semantically Constrained Memory "
        "Allocation (SCMA) for Embedding in Efficient Recommendation Systems. 2021.",
        "2103.06124",
    ),
    "sparsity": (
        "S. Wang, Y. Sui, J. Wu, Z. Zheng, H. Xiong. Dynamic Sparse Learning: A Novel Paradigm for "
        "Efficient Recommendation. 2024.",
        "2402.02855",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says.

    Args:
        name: title; the last part of a Hub id or folder.
        library: that loads the model.
        sections: text in Markdown by heading; "" is the text under the title.
        tags: for the Hub's search.
        results: metrics, which become the card's model-index.
        metadata: more keys of the card's metadata, None for those that are not known.
    """

    name: str
    library: str
    sections: Mapping[str, str]
    tags: Sequence[str] = ()
    results: Sequence[EvalResult] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return the card without its metadata, ending with a mark by which it is known again."""
        parts = [f"# {self.name}"]
        for heading, text in self.sections.items():
            parts += [f"## {heading}", text] if heading else [text]
        body = "\n\n".join(part.strip() for part in parts)
        return f"{body}\n\n{_MARK.format(digest=_digest(body))}\n"


def write_card(folder: str | Path, card: Card) -> bool:
    """Write README.md into `folder`, unless somebody wrote or edited the one that is there.

    Metadata that others added to a card of ours, such as a licence, stays.

    Args:
        folder: of a saved model.
        card: what to say.

    Returns:
        Whether the card was written; if not, a warning says so.

    Raises:
        DataError: if there is a README.md that is not UTF-8.
    """
    path = Path(folder) / README
    data = ModelCardData(
        library_name=card.library,
        tags=list(card.tags),
        model_name=card.name,
        eval_results=list(card.results) or None,
        **card.metadata,
    )
    if path.exists():
        before = read_card(path)
        if not is_generated(before):
            warnings.warn(
                f"{README} in {Path(folder).name} was written or edited by hand and stays as it "
                "is; remove it to get a model card",
                stacklevel=2,
            )
            return False
        _keep_metadata(ModelCard(before, ignore_metadata_errors=True).data.to_dict(), data)
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{card.text()}")
    return True


def read_card(path: Path) -> str:
    """Return a README.md as text.

    Raises:
        DataError: if it is none.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(path.name, "not UTF-8", "Save it as UTF-8, or remove it") from error


def is_generated(readme: str) -> bool:
    """Return whether write_card wrote this README, and nobody edited its text since.

    Metadata may have been edited, as long as it is YAML.
    """
    metadata = _METADATA.match(readme)
    body = readme[metadata.end() :] if metadata else readme
    marked = _MARKED.search(body)
    if marked is None or marked[1] != _digest(body[: marked.start()]):
        return False
    try:
        ModelCard(readme)
    except (yaml.YAMLError, ValueError):
        return False
    return True


def loss_text(loss_type: str, knobs: Mapping[str, Any]) -> str:
    """Return a loss and its knobs in words."""
    given = (
        f"knobs `{json.dumps(dict(knobs), default=str, sort_keys=True)}`"
        if knobs
        else "its default knobs"
    )
    return f"`{loss_type}` with {given}"


def citations(papers: Iterable[str]) -> str:
    """Return a list of papers, those that are not in PAPERS left out."""
    known = [PAPERS[paper] for paper in dict.fromkeys(papers) if paper in PAPERS]
    return "\n".join(
        f"- {paper} [arXiv {number}](https://arxiv.org/abs/{number})" for paper, number in known
    )


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table in Markdown, a column for each entry of `columns` and a row a metric."""
    names = dict.fromkeys(name for values in columns.values() for name in values)
    lines = [f"| metric | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for name in names:
        cells = [f"{v[name]:,.4f}" if name in v else "" for v in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _keep_metadata(before: dict[str, Any], data: ModelCardData) -> None:
    """Add to `data` what it lacks of the metadata `before`, in place."""
    for key, value in before.items():
        if key not in ("tags", "model-index") and data.get(key) is None:
            data[key] = value
    theirs = [tag for tag in before.get("tags") or [] if not str(tag).startswith("loss:")]
    data.tags = list(dict.fromkeys([*(data.tags or []), *theirs]))


def _digest(body: str) -> str:
    text = "\n".join(line.rstrip() for line in body.strip().splitlines())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
