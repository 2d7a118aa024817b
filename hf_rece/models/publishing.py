"""A recommender that is saved, shared and loaded as one repository: weights, items, card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)
from transformers.initialization import no_init_weights
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from hf_rece.card import README, is_generated, read_card, write_card
from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.errors import ArgumentError, HubError
from hf_rece.files import complete_files, finish_files, make_folder, write_text
from hf_rece.models.loading import (
    check_config,
    check_is_recommender,
    check_item_codes,
    check_keys,
    check_shapes,
    check_shards,
    check_sizes,
    check_token,
    clear_loading_errors,
    damaged_settings,
    hub_options,
)
from hf_rece.models.recommender_card import recommender_card
from hf_rece.models.recommender_config import RecommenderConfig
from hf_rece.models.sharded_checkpoint import ShardedCheckpoints, weight_files
from hf_rece.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

# What an earlier version may have left, and from_pretrained would read beside a later one.
_REPLACED = ("model*.safetensors", "model.safetensors.index.json", "items.json")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_PUSH_OPTIONS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr",
    "tags",
)  # fmt: skip


class PublishedRecommender(ShardedCheckpoints):
    """Base of RecommenderModel: saves and loads the tokenizer and a model card with the weights."""

    config: RecommenderConfig
    config_class = RecommenderConfig
    tokenizer: ItemTokenizer | None

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Save config and weights, the tokenizer where the model has one, and a model card.

        A README.md that somebody wrote or edited stays as it is, with a warning. A model that was
        there before stays too until the new one is complete.

        Args:
            save_directory: folder; its name is the model's in the card.
            **kwargs: as PreTrainedModel's; with push_to_hub=True also those of push_to_hub.

        Raises:
            WriteError: if the disk is full or the folder cannot be written.
        """
        if self.vocab_shards is not None:
            kwargs["is_main_process"] = self.vocab_shards.is_main
        pushes = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if pushes and name in kwargs}
        together = kwargs.get("distributed_checkpoint", False)
        if together or not kwargs.get("is_main_process", True):
            self._save_without_card(save_directory, **kwargs)
        else:
            stale = () if kwargs.get("variant") else WEIGHTS
            folder = make_folder(save_directory)
            with complete_files(folder, CONFIG_NAME, replaced=stale) as part:
                self._save_without_card(part, **kwargs)
        if self.vocab_shards is not None:
            self.vocab_shards.wait_for_all()  # and may read the files now
        if kwargs.get("is_main_process", True):
            self.write_model_card(save_directory)
            if pushes:
                self.push_to_hub(hub.pop("repo_id", Path(save_directory).resolve().name), **hub)

    def _save_without_card(self, folder: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)
        if self.tokenizer is not None and kwargs.get("is_main_process", True):
            self.tokenizer.save_pretrained(folder)

    def write_model_card(
        self, folder: str | Path, repo_id: str | None = None, tags: Sequence[str] = ()
    ) -> bool:
        """Write README.md into a folder, unless somebody wrote or edited the one that is there.

        Args:
            folder: that the model is saved in.
            repo_id: how the card's example names the model; the folder's name if None.
            tags: more tags.

        Returns:
            Whether the card was written.
        """
        items = [] if self.tokenizer is None else self.tokenizer.items
        name = Path(folder).resolve().name if repo_id is None else repo_id
        return write_card(folder, recommender_card(self.config, name, items, tags))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] | str | None = None,
    ) -> Any:
        """Upload weights, tokenizer and card in one commit; a card edited on the Hub stays.

        Args:
            repo_id: of the repository, made if it is not there.
            commit_message: of the commit.
            commit_description: of the commit.
            private: make a new repository private.
            token: of a user who may write there; that of `hf auth login` if None.
            revision: branch to push to, made if it is not there.
            create_pr: open a pull request instead.
            max_shard_size: of a file of weights.
            tags: more tags for the card.

        Returns:
            The commit's description, as HfApi.create_commit.

        Raises:
            ArgumentError: for a token that cannot be sent.
            HubError: if the Hub refuses; then nothing is published.
        """
        check_token("token", token)
        if self.vocab_shards is not None and not self.vocab_shards.is_main:
            self._save_without_card("", is_main_process=False)  # sends its rows
            return None
        api = HfApi(library_name="hf_rece", library_version=__version__, token=token)
        more = [tags] if isinstance(tags, str) else list(tags or [])
        with clear_upload_errors(repo_id), TemporaryDirectory() as folder:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            fetch_card(repo_id, folder, token=token, revision=revision)
            self._save_without_card(folder, max_shard_size=max_shard_size)
            self.write_model_card(folder, repo_id, [*(self.model_tags or []), *more])
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            # upload_folder may split what it sends into several commits; this is one.
            return api.create_commit(
                repo_id,
                _operations(folder, api.list_repo_files(repo_id, revision=revision)),
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any
    ) -> Self:
        """Load a saved recommender, with its tokenizer where one is saved beside it.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *args: as PreTrainedModel's.
            **kwargs: as PreTrainedModel's: dtype, device_map, revision, token and others. With
                vocab_parallel=True, or vocab_parallel_size, each process reads the rows of its
                classes alone; see cut_vocabulary.

        Raises:
            ArgumentError: if there is no such repository or revision, if it holds another model, or
                more items than the model has rows; for a token that cannot be sent.
            DataError: if a file is damaged, or the weights do not fit the configuration.
        """
        if pretrained_model_name_or_path is None:  # from a configuration and weights at hand
            return super().from_pretrained(None, *args, **kwargs)
        source, hub = str(pretrained_model_name_or_path), hub_options(kwargs)
        check_token("token", hub.get("token"))
        kwargs.setdefault("use_safetensors", True)
        if Path(source).is_dir():
            finish_files(source, CONFIG_NAME, replaced=WEIGHTS)
        with clear_loading_errors(source, hub):
            check_shards(source, hub)
            if kwargs.get("config") is None:
                check_is_recommender(source, cls.config_class.model_type, hub)
                config: Any = check_config(source, cls.config_class, hub)
                if not kwargs.get("ignore_mismatched_sizes") and kwargs.get("state_dict") is None:
                    with torch.device("meta"), no_init_weights():
                        empty: Any = cls(config)
                    check_shapes(source, empty, weight_files(source, hub))
            wants_info = kwargs.pop("output_loading_info", False)
            names: tuple[str, ...] = ("vocab_parallel", "vocab_parallel_size")
            cut = {name: kwargs.pop(name) for name in names if name in kwargs}
            if any(cut.values()):
                found: Any = cls._cut(source, kwargs, hub, cut), {}
            else:
                found = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
            loaded, info = found
            if not kwargs.get("ignore_mismatched_sizes") and kwargs.get("state_dict") is None:
                check_keys(source, info)
            check_item_codes(source, loaded)
            items_file = ItemTokenizer.vocab_files_names["items_file"]
            if cached_file(source, items_file, _raise_exceptions_for_missing_entries=False, **hub):
                with damaged_settings(source, "tokenizer_config.json or items.json"):
                    loaded.tokenizer = ItemTokenizer.from_pretrained(source, **hub)
                check_sizes(loaded.tokenizer, loaded.config.vocab_size)
        result: Self = found if wants_info else loaded
        return result

    @classmethod
    def _cut(
        cls, source: str, given: Mapping[str, Any], hub: Mapping[str, Any], cut: Mapping[str, Any]
    ) -> Any:
        """Load a model whose vocabulary is cut over processes, or a whole one where there is one.

        Raises:
            ArgumentError: for arguments that this way of loading does not know.
        """
        known = {"config", "dtype", "use_safetensors", *hub}
        if unknown := sorted(given.keys() - known):
            raise ArgumentError(
                "vocab_parallel", True, f"does not go with {', '.join(unknown)}", "Leave them out"
            )
        config = given.get("config") or cls.config_class.from_pretrained(source, **hub)
        model = cls(config, **cut)
        if model.vocab_shards is None:
            return super().from_pretrained(source, **given)
        dtype = given.get("dtype") or config.dtype
        if isinstance(dtype, torch.dtype):
            model = model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        model.load_weights(source, weight_files(source, hub))
        return model.eval()


def _operations(
    folder: str, there: Sequence[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return what makes a repository with the files `there` one with those of `folder`."""
    paths = sorted(Path(folder).iterdir())
    here = {path.name for path in paths}
    stale = [
        name
        for name in there
        if name not in here and any(fnmatch(name, pattern) for pattern in _REPLACED)
    ]
    return [
        *(CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]


def fetch_card(
    repo_id: str, folder: str | Path, *, token: Any = None, revision: str | None = None
) -> None:
    """Put the Hub's README.md into `folder`, if the Hub has one and the folder none of a person.

    Args:
        repo_id: of a repository.
        folder: where to put it.
        token: of a user who may read it.
        revision: branch.

    Raises:
        DataError: if one of them is not UTF-8.
    """
    here = Path(folder) / README
    if here.exists() and not is_generated(read_card(here)):
        return
    try:
        there = hf_hub_download(repo_id, README, token=token, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    write_text(here, read_card(Path(there)))


@contextmanager
def clear_upload_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one message.

    Args:
        repo_id: of the repository that is written to.

    Raises:
        HubError: in place of errors of the Hub and of the network.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        status = next(
            (e.response.status_code for e in _chain(error) if isinstance(e, HfHubHTTPError)), None
        )
        no_token = isinstance(error, LocalTokenNotFoundError)
        if status is None and not no_token and not any(map(_of_network, _chain(error))):
            raise
        reason = str(list(_chain(error))[-1]).strip().partition("\n")[0].rstrip(".")
        if no_token or status in (401, 403, 404):
            raise HubError(
                repo_id,
                f"the Hub lets you write nothing there ({reason})",
                "Log in with `hf auth login` as a user who may, or pass token=...",
            ) from error
        raise HubError(
            repo_id,
            f"the upload failed, and nothing of it was published ({reason})",
            "Push again: files that arrived are not sent twice",
        ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, and so on, down to what the Hub answered."""
    while error is not None:
        yield error
        if isinstance(error, HfHubHTTPError):
            return
        error = error.__cause__


def _of_network(error: BaseException) -> bool:
    # huggingface_hub went from requests to httpx to httpx2: what they raise has no common class.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests")
