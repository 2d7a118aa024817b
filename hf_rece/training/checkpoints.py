"""Checkpoints that appear when they are complete, and resuming from those alone."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import (
    FSDP_MODEL_NAME,
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hf_rece.card import README
from hf_rece.errors import ArgumentError
from hf_rece.files import (
    UNFINISHED,
    clear_write_errors,
    complete_files,
    make_folder,
    sync,
    sync_files,
)
from hf_rece.models.loading import problem_of_shards
from hf_rece.models.publishing import WEIGHTS, PublishedRecommender

logger = logging.get_logger(__name__)


class WholeCheckpoints(Trainer):
    """Trainer whose checkpoints are whole, or not there, whenever it is killed.

    A checkpoint is written into a folder of another name, which takes its own when all is on the
    disk; only then may an older one be deleted. The final model is written likewise.

    train(resume_from_checkpoint=True) takes the newest checkpoint that is whole, and says which it
    leaves out: transformers' Trainer, killed while it saves, leaves one without its optimizer, and
    would go on from there with a new one.

    With FSDP a checkpoint holds the whole model in model.safetensors, as ever, and what Accelerate
    resumes from; it resumes with FSDP alone.

    On a CPU, in one process with as many threads, a resumed run ends with the weights of an
    undisturbed one to the bit, whatever the loss. On GPUs rows are added up in any order, by torch
    and by Triton's kernels, unless args.full_determinism is set.
    """

    _is_saving = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as transformers.Trainer does.

        Raises:
            ArgumentError: if the checkpoint to resume from is damaged, or none is whole.
            WriteError: if the disk is full; checkpoints written before are as they were.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_whole_checkpoint()
        elif resume_from_checkpoint:
            problem = self._problem_of(Path(str(resume_from_checkpoint)))
            if problem is not None:
                raise ArgumentError(
                    "resume_from_checkpoint",
                    resume_from_checkpoint,
                    problem,
                    "Pass another, or True for the newest that is whole",
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_whole_checkpoint(self) -> str | bool:
        """Return the folder of one; True where there are none, for Trainer to say so."""
        folders = sort_checkpoints(str(self.args.output_dir))
        problems: dict[str, str] = {}
        for folder in reversed(folders):
            problem = self._problem_of(Path(folder))
            if problem is None:
                for name, reason in problems.items():
                    logger.warning(f"{name} is left out: {reason}.")
                return folder
            problems[Path(folder).name] = problem
        if problems:
            raise ArgumentError(
                "resume_from_checkpoint",
                True,
                "; ".join(f"{name}: {problem}" for name, problem in problems.items()),
                "None is whole: train from the start",
            )
        return True

    def _problem_of(self, checkpoint: Path) -> str | None:
        """Return what a checkpoint lacks to go on from, None if nothing."""
        needed = [TRAINER_STATE_NAME]
        has_own_files = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not (has_own_files or self.args.save_only_model):
            needed += [OPTIMIZER_NAME, SCHEDULER_NAME]
        if not has_own_files and not any(checkpoint.rglob("*model*.safetensors")):
            needed.append(SAFE_WEIGHTS_NAME)
        missing = [name for name in needed if not (checkpoint / name).is_file()]
        if self.is_fsdp_enabled and not any(checkpoint.glob(f"{FSDP_MODEL_NAME}*")):
            missing.append(f"{FSDP_MODEL_NAME}.bin")
        if missing:
            return f"there is no {', '.join(missing)} in it"
        torch_files = [path for end in ("pt", "pth", "bin") for path in checkpoint.glob(f"*.{end}")]
        cut = [path.name for path in torch_files if not zipfile.is_zipfile(path)]
        cut += [path.name for path in checkpoint.glob("*.json") if not _is_json(path)]
        cut += [path.name for path in checkpoint.glob("*.safetensors") if not _opens(path)]
        if cut:
            return f"{', '.join(sorted(cut))} is cut short"
        return problem_of_shards(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        part = run / UNFINISHED / checkpoint.name
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()
        with clear_write_errors(checkpoint), self._saving(run / UNFINISHED):
            super()._save_checkpoint(model, trial)
            self._name_best(part, checkpoint)
            self.accelerator.wait_for_everyone()
            # Machines that share no disk each have a part, of which others know nothing.
            first = self.is_world_process_zero()
            for has_turn in (first, self.is_local_process_zero() and not first):
                if has_turn and part.exists():
                    _give_name(part, checkpoint)
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            self._rotate(run)

    def _rotate(self, run: Path) -> None:
        """Delete old checkpoints as Trainer does, but none of them in part under its name."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        folders = sort_checkpoints(str(run), use_mtime=True)
        protected = {folders[-1]} | ({str(Path(best))} if best else set())
        old = [folder for folder in folders if folder not in protected]
        if limit is not None and limit > 0:
            for folder in old[: len(folders) - max(limit, len(protected))]:
                Path(folder).rename(make_folder(run / UNFINISHED) / Path(folder).name)
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[None]:
        """Let Trainer take `folder` for that of its run; nothing of it is left."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False
            shutil.rmtree(folder, ignore_errors=True)

    def _name_best(self, part: Path, checkpoint: Path) -> None:
        """Call the best checkpoint by its own name, if it is the one being written."""
        if self.state.best_model_checkpoint == str(part):
            self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                self.state.save_to_json(str(part / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # the upload goes on after the checkpoint has got its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        if state_dict is not None:  # of FSDP, which names a tied weight as often as it is used
            tied = getattr(model, "all_tied_weights_keys", {})
            state_dict = {name: t for name, t in state_dict.items() if name not in tied}
        if self._is_saving or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = make_folder(str(self.args.output_dir if output_dir is None else output_dir))
        is_recommender = isinstance(model, PublishedRecommender)
        config = ADAPTER_CONFIG_NAME if hasattr(model, "peft_config") else CONFIG_NAME
        with complete_files(folder, config, replaced=WEIGHTS) as part:
            if not is_recommender and (folder / README).exists():
                shutil.copy(folder / README, part)  # PEFT adds to it
            super()._save(str(part), state_dict)
            if is_recommender:
                (part / README).unlink()  # it names the wrong folder
        if is_recommender:
            model.write_model_card(folder)


def _give_name(part: Path, checkpoint: Path) -> None:
    sync_files(part)
    if checkpoint.exists():
        checkpoint.rename(part.with_name("replaced"))
    part.rename(checkpoint)
    sync(checkpoint.parent)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return True


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
