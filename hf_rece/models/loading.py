"""What can be wrong with a saved recommender, each said in one message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.embeddings.compositional import CompositionalEmbedding
from hf_rece.embeddings.digits import check_digits, widened
from hf_rece.errors import ArgumentError, DataError, HfReceError
from hf_rece.models.settings import FOREIGN, reason_of

SOURCE = "pretrained_model_name_or_path"
_OPTIONS = (
    "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder",
)  # fmt: skip


def hub_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of from_pretrained's arguments that say where a file comes from."""
    return {name: given[name] for name in _OPTIONS if name in given}


def check_token(argument: str, token: object) -> None:
    """Check that a token of the Hub can be sent: HTTP clients show what they cannot send.

    Args:
        argument: that it was passed as.
        token: text, or anything else that huggingface_hub takes.

    Raises:
        ArgumentError: for text with a line break, a blank, or what is not ASCII; does not show it.
    """
    if isinstance(token, str) and not all("!" <= letter <= "~" for letter in token):
        raise ArgumentError(
            argument,
            "...",
            "it holds characters that no token has, such as a line break",
            "Pass it stripped of them",
        )


def check_is_recommender(source: str, model_type: str, hub: Mapping[str, Any]) -> None:
    """Check that `source` holds a model of a type.

    Args:
        source: folder or Hub id.
        model_type: what its configuration must say.
        hub: as hub_options returns them.

    Raises:
        ArgumentError: if it holds another model, or none.
    """
    found, _ = PreTrainedConfig.get_config_dict(source, **hub)
    if found.get("model_type") == model_type:
        return
    if not found:
        raise ArgumentError(
            SOURCE, source, f"there is no {CONFIG_NAME} in it", "Pass what save_pretrained wrote"
        )
    kind = ", ".join([str(found.get("model_type")), *(found.get("architectures") or [])])
    raise ArgumentError(
        SOURCE,
        source,
        f"it holds another model ({kind}), not a recommender",
        "Load it with transformers' AutoModel, or pass a recommender's folder or Hub id",
    )


@contextmanager
def damaged_settings(source: str, file: str) -> Iterator[None]:
    """Turn whatever transformers raises over the values of a damaged JSON file into one message.

    Args:
        source: folder or Hub id.
        file: that is being read, and nothing else.

    Raises:
        DataError: naming the file.
    """
    try:
        yield
    except HfReceError:
        raise
    except FOREIGN as error:
        raise DataError(
            f"{source}, {file}",
            f"damaged, or written by hand ({reason_of(error)})",
            "Copy or download it again, or save the model again",
        ) from error


def check_config(
    source: str, config_class: type[PreTrainedConfig], hub: Mapping[str, Any]
) -> PreTrainedConfig:
    """Return a recommender's configuration, if it can be read.

    Args:
        source: folder or Hub id.
        config_class: of the recommender.
        hub: as hub_options returns them.

    Raises:
        ArgumentError: for a setting that the configuration refuses.
        DataError: for a file that is damaged.
    """
    with damaged_settings(source, CONFIG_NAME):
        config = config_class.from_pretrained(source, **hub)
        if not isinstance(config.dtype, torch.dtype | str | None):
            raise TypeError(f"dtype is {config.dtype!r}")
        if (quantization := getattr(config, "quantization_config", None)) is not None:
            AutoQuantizationConfig.from_dict(quantization)
    return config


def check_sizes(tokenizer: ItemTokenizer, vocab_size: int) -> None:
    """Check that a model has a row for each item.

    Raises:
        ArgumentError: if the tokenizer has more items than the model has rows.
    """
    if len(tokenizer) > vocab_size:
        raise ArgumentError(
            "tokenizer",
            f"{len(tokenizer) - 1} items",
            f"the model has vocab_size={vocab_size}, rows for {vocab_size - 1} items",
            "Pass the tokenizer that the model was trained with",
        )


def check_shards(source: str, hub: Mapping[str, Any]) -> None:
    """Check that the index of sharded weights, if there is one, names files beside it.

    Raises:
        DataError: if it is damaged, or names a file elsewhere, which transformers would open; and
            for a folder in which one of them is missing.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False}
    found = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **quiet, **hub)
    if found is None:
        return
    index = Path(found)
    is_here = Path(source).is_dir()  # and not to be downloaded yet
    problem = problem_of_shards(index.parent) if is_here else _problem_of_index(index)
    if problem is not None:
        raise DataError(source, problem, "Do not use it, or save the model again")


def problem_of_shards(folder: Path) -> str | None:
    """Return what is wrong with the sharded weights in a folder, None if nothing."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return None
    problem = _problem_of_index(index)
    if problem is not None:
        return problem
    names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    return f"there is no {', '.join(missing)} in it" if missing else None


def _problem_of_index(index: Path) -> str | None:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{index.name} is damaged"
    # Symbolic links are fine: so the cache of the Hub stores files.
    astray = sorted(str(name) for name in names if Path(str(name)).name != name)
    return f"{index.name} names files elsewhere ({', '.join(astray[:3])})" if astray else None


def check_shapes(source: str, model: nn.Module, files: Iterable[Path]) -> None:
    """Check that weights have the shapes that a configuration asks for, before memory is taken.

    transformers makes what does not fit at random before it says so.

    Args:
        source: folder or Hub id.
        model: of the configuration, on "meta".
        files: of weights.

    Raises:
        DataError: naming one that has not.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in wanted.keys() & set(file.keys()):
                shape = file.get_slice(name).get_shape()
                if shape != wanted[name]:
                    raise DataError(
                        source,
                        f"its weights do not fit its {CONFIG_NAME}, or are damaged ({name} has "
                        f"shape {shape}, and the model wants {wanted[name]})",
                        "Save the model again; with ignore_mismatched_sizes=True it is loaded all "
                        "the same",
                    )


def check_keys(source: str, info: Mapping[str, Any]) -> None:
    """Check that a model took all weights of a file, and all of its own from it.

    Args:
        source: folder or Hub id.
        info: what from_pretrained returns with output_loading_info.

    Raises:
        DataError: if some are left over, or were missing and made at random.
    """
    for key, problem in (("missing_keys", "lack"), ("unexpected_keys", "have besides")):
        names = sorted(map(str, info.get(key) or ()))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(
                source,
                f"its weights do not fit its {CONFIG_NAME}: they {problem} "
                f"{', '.join(names[:3])}{more}",
                "Save the model again; with ignore_mismatched_sizes=True it is loaded all the same",
            )


def check_item_codes(source: str, model: nn.Module) -> None:
    """Check that the codes of compositional tables, which are saved with the weights, are codes.

    Raises:
        DataError: if a digit is out of range.
    """
    for table in model.modules():
        if isinstance(table, CompositionalEmbedding) and table.codes is not None:
            try:
                check_digits(widened(table.codes), table.radices)
            except ArgumentError as error:
                raise DataError(
                    source,
                    f"the codes of its items are damaged ({reason_of(error)})",
                    "Copy or download it again, or save the model again",
                ) from error


@contextmanager
def clear_loading_errors(source: str, hub: Mapping[str, Any]) -> Iterator[None]:
    """Turn errors of loading into one message that names the argument, its value and the fix.

    Args:
        source: folder or Hub id.
        hub: as hub_options returns them.

    Raises:
        ArgumentError: for a repository or revision that is not there or not to be read.
        DataError: for weights that are damaged, or do not fit the configuration, and for a
            configuration that is not JSON, or whose values are of other types.
    """
    try:
        yield
    except SafetensorError as error:
        raise DataError(
            _damaged_file(source, hub),
            f"damaged or cut short ({error})",
            "Copy or download it again, from the Hub with force_download=True",
        ) from error
    except OSError as error:
        causes = tuple(_causes(error))
        if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            raise ArgumentError(
                "revision",
                hub.get("revision"),
                f"{source} has no such branch, tag or commit",
                "Pass one that it has, or none for its main branch",
            ) from error
        unknown = (RepositoryNotFoundError, HFValidationError)
        if any(isinstance(cause, unknown) for cause in causes):
            raise ArgumentError(
                SOURCE,
                source,
                "no such folder, and no such repository that you may read on the Hub",
                "Check the name; for a private repository log in with `hf auth login`, or pass "
                "token=...",
            ) from error
        if "not a valid JSON file" in str(error):
            raise DataError(
                f"{source}, {CONFIG_NAME}",
                "not JSON: damaged or cut short",
                "Copy or download it again, from the Hub with force_download=True",
            ) from error
        raise
    except ImportError as error:
        raise ArgumentError(
            SOURCE, source, f"it needs what is not installed ({reason_of(error)})", "Install it"
        ) from error
    except RecursionError as error:
        raise DataError(
            source, "one of its JSON files is nested too deep", "Do not use it"
        ) from error
    except RuntimeError as error:
        if "mismatched" not in str(error) and "CONVERSION" not in str(error):
            raise
        raise DataError(
            source,
            f"its weights do not fit its {CONFIG_NAME}, or are damaged ({_first_line(error)})",
            "Save the model again; the warning above lists the weights",
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _damaged_file(source: str, hub: Mapping[str, Any]) -> str:
    """Return the name of the first file of weights that cannot be opened, or else the source."""
    config = cached_file(source, CONFIG_NAME, **{**hub, "force_download": False})
    for path in sorted(Path(str(config)).parent.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{source}, {path.name}"
    return source
