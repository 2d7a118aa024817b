"""Checkpoints that appear when they are complete, and resuming from those alone."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
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
    write_text,
)
from hf_rece.models.loading import problem_of_shards
from hf_rece.models.publishing import WEIGHTS, PublishedRecommender

# In a checkpoint, written last: the bytes of each of its files.
FILES = "files.json"
# Beside UNFINISHED, in which other processes may still be: what is about to be deleted.
OLD = f"{UNFINISHED}-old"
_REPLACED = "replaced-"
_NONE, _DAMAGED = -1, -2
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

        Args:
            resume_from_checkpoint: folder of a checkpoint; True, or "true" as a command line has
                it, for the newest that is whole.
            *args: as transformers.Trainer's.
            **kwargs: as transformers.Trainer's.

        Raises:
            ArgumentError: if the checkpoint to resume from is damaged, or none is whole.
            WriteError: if the disk is full; checkpoints written before are as they were.
        """
        self._in_turn(lambda: _put_back(Path(str(self.args.output_dir))))
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoint_of_first_process(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _checkpoint_of_first_process(self, wanted: str | bool) -> str | bool:
        """Return the checkpoint to resume from: one process looks, and tells all. Collective.

        Args:
            wanted: folder of a checkpoint; True or "true" for the newest that is whole.

        Raises:
            ArgumentError: in all of them, if it found that one damaged, or none that is whole.
            OSError: in it, and ArgumentError in the others, if it cannot read what is there.
        """
        takes_newest = str(wanted).lower() == "true"
        step = _NONE
        error: Exception | None = None
        if self.is_world_process_zero():
            try:
                if takes_newest:
                    newest = self._newest_whole_checkpoint()
                    step = int(newest.rpartition("-")[2]) if isinstance(newest, str) else _NONE
                else:
                    self._check(Path(str(wanted)))
            except (ArgumentError, OSError) as found:
                step, error = _DAMAGED, found
        step = int(broadcast(torch.tensor([step], device=self.args.device))[0])
        if step == _DAMAGED:
            raise error or ArgumentError(
                "resume_from_checkpoint",
                wanted,
                f"the first process found {'none that is whole' if takes_newest else 'it damaged'}",
                "Read what it says",
            )
        if not takes_newest:
            return wanted
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        return True if step == _NONE else str(folder)

    def _check(self, checkpoint: Path) -> None:
        problem = self._problem_of(checkpoint)
        if problem is not None:
            raise ArgumentError(
                "resume_from_checkpoint",
                str(checkpoint),
                problem,
                "Pass another, or True for the newest that is whole",
            )

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
        if (problem := _problem_of_files(checkpoint)) is not None:
            return problem
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
            for left in (UNFINISHED, OLD):  # of a process that was killed
                shutil.rmtree(run / left, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with clear_write_errors(checkpoint), self._saving(run / UNFINISHED):
            super()._save_checkpoint(model, trial)
            self._name_best(part, checkpoint)
            self.accelerator.wait_for_everyone()
            # Machines that share no disk each have a part, of which others know nothing.
            self._in_turn(lambda: _give_name(part, checkpoint))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            self._rotate(run)

    def _in_turn(self, work: Callable[[], None]) -> None:
        """Let the first process work, and then the first ones of other machines. Collective."""
        first = self.is_world_process_zero()
        for has_turn in (first, self.is_local_process_zero() and not first):
            if has_turn:
                work()
            self.accelerator.wait_for_everyone()

    def _rotate(self, run: Path) -> None:
        """Delete old checkpoints as Trainer does, but none of them in part under its name."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        folders = sort_checkpoints(str(run), use_mtime=True)
        protected = {folders[-1]} | ({str(Path(best))} if best else set())
        old = [folder for folder in folders if folder not in protected]
        if limit is not None and limit > 0:
            for folder in old[: len(folders) - max(limit, len(protected))]:
                Path(folder).rename(make_folder(run / OLD) / Path(folder).name)
            shutil.rmtree(run / OLD, ignore_errors=True)

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[None]:
        """Let Trainer take `folder` for that of its run; nothing of it is left."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False
            if self.is_local_process_zero():
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
    if not part.exists():  # another machine has given it, on a disk that both share
        return
    sizes = {str(path.relative_to(part)): path.stat().st_size for path in _files_in(part)}
    write_text(part / FILES, json.dumps(sizes, indent=1, sort_keys=True) + "\n")
    sync_files(part)
    if checkpoint.exists():
        checkpoint.rename(part.with_name(f"{_REPLACED}{checkpoint.name}"))
    try:
        part.rename(checkpoint)
    finally:
        _put_back(checkpoint.parent)
    sync(checkpoint.parent)


def _put_back(run: Path) -> None:
    """Name a checkpoint again that was about to be replaced when the process was killed."""
    for replaced in (run / UNFINISHED).glob(f"{_REPLACED}*"):
        checkpoint = run / replaced.name.removeprefix(_REPLACED)
        if not checkpoint.exists():
            replaced.rename(checkpoint)
            sync(run)


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _problem_of_files(checkpoint: Path) -> str | None:
    """Return which files of a checkpoint are missing or of another length than they were."""
    if not (checkpoint / FILES).is_file():
        return None  # an earlier version wrote it
    if not _is_json(checkpoint / FILES):
        return f"{FILES} is cut short"
    sizes = json.loads((checkpoint / FILES).read_text("utf-8"))
    if not isinstance(sizes, dict):
        return f"{FILES} lists no files"
    there = {
        str(path.relative_to(checkpoint)): path.stat().st_size for path in _files_in(checkpoint)
    }
    missing = [name for name in sizes if name not in there]
    if missing:
        return f"there is no {', '.join(missing)} in it"
    other = [name for name, size in sizes.items() if there[name] != size]
    return f"{', '.join(other)} is cut short, or has been changed" if other else None


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
