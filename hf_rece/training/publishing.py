"""What a trainer publishes: the model with a card of its run, by a push that lands or says why."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_rece.card import README, Card, is_generated, read_card, write_card
from hf_rece.files import write_text
from hf_rece.head import find_head
from hf_rece.models.publishing import clear_upload_errors, fetch_card
from hf_rece.training.card import language_model_card


@dataclass(frozen=True)
class LanguageModelFacts:
    """What is known of a finished run on text.

    Args:
        figures: exact metrics by name, with _before and _after; cost.
        base_model: Hub id or folder of what was fine-tuned.
        readme: what somebody wrote into README.md before the run; None if there was nothing.
    """

    figures: Mapping[str, float]
    base_model: str | None
    readme: str | None


def readme_of_somebody(folder: str | Path) -> str | None:
    """Return the README.md in a folder, if somebody wrote or edited it."""
    path = Path(folder) / README
    text = read_card(path) if path.exists() else None
    return None if text is None or is_generated(text) else text


class Publishing(Trainer):
    """Trainer that pushes the card of its run, where it knows enough for one.

    A failed push raises one HubError, and publishes nothing. A README.md that somebody wrote or
    edited, in the folder or on the Hub, stays as it is.
    """

    language_model_facts: LanguageModelFacts | None = None

    def run_card(self, repo_id: str) -> Card | None:
        """Return the card of this run; None for the one that Trainer makes.

        Args:
            repo_id: Hub id, or name of the folder.
        """
        facts = self.language_model_facts
        if facts is None or "perplexity_after" not in facts.figures:
            return None
        head = find_head(self.accelerator.unwrap_model(self.model))
        loss = {"loss_type": "cross_entropy"} if head is None else head.loss.to_dict()
        adapter = Path(str(self.args.output_dir)) / "adapter_config.json"
        library = "peft" if adapter.exists() else "transformers"
        return language_model_card(repo_id, library, loss, facts.figures, facts.base_model)

    def create_model_card(  # type: ignore[override]
        self, **given: Any
    ) -> None:
        """Write README.md into args.output_dir.

        Args:
            **given: as Trainer's: language, license, tags, model_name, finetuned_from,
                dataset_tags.
        """
        folder = Path(str(self.args.output_dir))
        repo_id = getattr(self, "hub_model_id", None) or folder.resolve().name
        card = self.run_card(repo_id)
        if card is None:
            super().create_model_card(**given)
        elif self.is_world_process_zero():
            self._clear_stubs(folder)
            write_card(folder, _with_given(card, given))

    def _clear_stubs(self, folder: Path) -> None:
        """Take away what TRL and PEFT wrote into README.md during the run."""
        facts, path = self.language_model_facts, folder / README
        if facts is None or readme_of_somebody(folder) is None:
            return
        if facts.readme is None:
            path.unlink()
        else:
            write_text(path, facts.readme)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository on the Hub.

        Raises:
            HubError: if the Hub refuses.
        """
        with clear_upload_errors(self._repo_name()):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push model, tokenizer and card as Trainer does.

        Raises:
            HubError: if the Hub refuses; then nothing is published.
        """
        with clear_upload_errors(self._repo_name()):
            token = kwargs.get("token") or self.args.hub_token
            if self.hub_model_id is None:
                given = {name: kwargs[name] for name in ("private",) if name in kwargs}
                self.init_hf_repo(token=token, **given)
            if self.hub_model_id is not None and self.is_world_process_zero():
                revision = kwargs.get("revision") or self.args.hub_revision
                folder = Path(str(self.args.output_dir))
                folder.mkdir(parents=True, exist_ok=True)
                fetch_card(self.hub_model_id, folder, token=token, revision=revision)
            return super().push_to_hub(*args, **kwargs)

    def _repo_name(self) -> str:
        return self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._warn_of_failed_pushes()
        if self.run_card("") is not None:
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Say what went wrong in the background, where Trainer says nothing."""
        push = getattr(self, "push_in_progress", None)
        finished = [job for job in push.jobs if job.done()] if push is not None else []
        for job in finished:
            push.jobs.remove(job)  # type: ignore[union-attr]
            if not job.cancelled() and job.exception() is not None:
                reason = str(job.exception()).strip().partition("\n")[0]
                warnings.warn(
                    f"a push during training to {self._repo_name()} failed: {reason}", stacklevel=2
                )


def _with_given(card: Card, given: Mapping[str, Any]) -> Card:
    """Return a card with what a user says of it, in the words of Trainer.create_model_card."""
    said = {
        "language": given.get("language"),
        "license": given.get("license"),
        "base_model": given.get("finetuned_from"),
        "datasets": given.get("dataset_tags"),
    }
    tags = given.get("tags") or []
    return dataclasses.replace(
        card,
        name=given.get("model_name") or card.name,
        tags=[*card.tags, *([tags] if isinstance(tags, str) else tags)],
        metadata={**card.metadata, **{key: value for key, value in said.items() if value}},
    )
