"""Checkpoints that are whole or not there."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers.trainer as of_transformers

from hf_rece.errors import ArgumentError, DataError, WriteError
from hf_rece.models.recommender import RecommenderModel
from hf_rece.training.reporting import TRAINING_RUN
from tests.processes import in_processes
from tests.training.test_trainer import make_data, make_trainer

data = pytest.fixture(make_data, scope="module", name="data")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP's threads do not outlive a fork, and a child would wait for them."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


RECORD = "training_run.json"  # of the whole run, beside its checkpoints
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != TRAINING_RUN)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A folder with the checkpoints of an undisturbed run, and its final model."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = make_trainer(data, folder, **SAVING)
    trainer.train()
    return folder, trainer.model


def copy_of(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved[0], folder)
    return folder


def test_nothing_unfinished_is_left(saved):
    assert names(saved[0]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert "model.safetensors" in names(saved[0] / "checkpoint-6")


def test_the_best_checkpoint_is_known_by_its_own_name(data, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    settings = {**SAVING, **best, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(data, tmp_path, **settings, learning_rate=1e-3)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-6")
    assert names(tmp_path) == ["checkpoint-6"]


@pytest.mark.parametrize("newest", [True, "true"])  # as Python and as a command line have it
def test_a_run_resumed_from_its_last_step_makes_no_more(data, saved, tmp_path, newest):
    folder = copy_of(saved, tmp_path)
    trainer = make_trainer(data, folder, **SAVING)
    trainer.train(resume_from_checkpoint=newest)
    assert trainer.state.global_step == 6
    assert names(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert same_weights(trainer.model, saved[1])


def test_no_checkpoint_is_deleted_in_part(data, tmp_path, monkeypatch):
    trainer = make_trainer(data, tmp_path, **SAVING, save_total_limit=1)
    delete, places = shutil.rmtree, set()

    def noting(path, **kwargs):
        places.add(Path(path).relative_to(tmp_path).parts[0])
        delete(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", noting)
    trainer.train()
    assert places == {"_unfinished", "_unfinished-old"}
    assert names(tmp_path) == ["checkpoint-6"]


# ----------------------------------------------------------------------------------------- damaged


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (remove, "trainer_state.json"),
        (remove, "optimizer.pt"),
        (remove, "scheduler.pt"),
        (remove, "model.safetensors"),
        (cut, "trainer_state.json"),
        (cut, "optimizer.pt"),
        (cut, "rng_state.pth"),
        (cut, "model.safetensors"),
        (cut, "config.json"),
    ],
)
def test_resuming_leaves_a_damaged_checkpoint_out(damage, file, data, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    damage(folder / "checkpoint-6" / file)
    trainer = make_trainer(data, folder, **SAVING)
    assert Path(trainer._newest_whole_checkpoint()).name == "checkpoint-4"
    with pytest.raises(ArgumentError, match=rf"resume_from_checkpoint=.*{file}"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_resuming_past_a_damaged_checkpoint_ends_as_if_nothing_had_happened(data, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    remove(folder / "checkpoint-6" / "optimizer.pt")
    trainer = make_trainer(data, folder, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert same_weights(trainer.model, saved[1])
    assert trainer._newest_whole_checkpoint() == str(folder / "checkpoint-6")


def test_where_none_is_whole_all_are_named(data, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    for checkpoint in folder.glob("checkpoint-*"):
        remove(checkpoint / "optimizer.pt")
    trainer = make_trainer(data, folder, **SAVING)
    with pytest.raises(ArgumentError, match=r"checkpoint-6: there is no optimizer.*checkpoint-2:"):
        trainer.train(resume_from_checkpoint=True)


def test_where_there_is_none_trainer_says_so(data, tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make_trainer(data, tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_weights_elsewhere_are_not_read(data, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    checkpoint = folder / "checkpoint-6"
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../../elsewhere.safetensors"}}
    remove(checkpoint / "files.json")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    trainer = make_trainer(data, folder, **SAVING)
    with pytest.raises(ArgumentError, match="names files elsewhere"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(DataError, match="names files elsewhere"):
        RecommenderModel.from_pretrained(checkpoint)


# ---------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize(
    "method", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]
)
def test_a_full_disk_leaves_the_checkpoints_that_are_there(method, data, tmp_path):
    def no_room():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = make_trainer(data, tmp_path, **SAVING, save_total_limit=1)
    after(method, 4, trainer, no_room)
    with pytest.raises(WriteError, match=r"checkpoint-4: not written \(No space left"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert trainer._newest_whole_checkpoint() == str(tmp_path / "checkpoint-2")


def test_a_full_disk_leaves_the_model_that_is_there(data, tmp_path, monkeypatch):
    first = make_trainer(data, tmp_path, max_steps=1)
    first.save_model()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    second = make_trainer(data, tmp_path, max_steps=1)
    second.model.get_input_embeddings().weight.data += 1

    def fails(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(of_transformers.torch, "save", fails)  # the last file that is written
    with pytest.raises(WriteError, match="not written"):
        second.save_model()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------- kills


def after(method, step, trainer, what):
    """Let `trainer` do something after a method of saving, at a step."""
    save = getattr(trainer, method)

    def saving(*args, **kwargs):
        save(*args, **kwargs)
        if trainer.state.global_step == step:
            what()

    setattr(trainer, method, saving)
    return trainer


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work):
    """Run `work` in a forked process; return the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["save_model", "_save_optimizer_and_scheduler", "_name_best"])
def test_a_run_that_is_killed_while_it_saves_goes_on(method, data, saved, tmp_path):
    def train():
        after(method, 4, make_trainer(data, tmp_path, **SAVING), die).train()

    assert in_child(train) == signal.SIGKILL
    assert "checkpoint-4" not in names(tmp_path)
    trainer = make_trainer(data, tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert same_weights(trainer.model, saved[1])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_checkpoint_that_is_written_again_is_never_lost(data, saved, tmp_path, monkeypatch):
    folder = copy_of(saved, tmp_path)
    rename = Path.rename

    def dying(path, target):
        if Path(target) == folder / "checkpoint-4":
            die()
        return rename(path, target)

    def train():
        monkeypatch.setattr(Path, "rename", dying)
        make_trainer(data, folder, **SAVING).train()

    assert in_child(train) == signal.SIGKILL
    shutil.rmtree(folder / "checkpoint-6")
    assert "checkpoint-4" not in names(folder)
    trainer = make_trainer(data, folder, **SAVING)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert names(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert same_weights(trainer.model, saved[1])


def test_a_checkpoint_that_cannot_be_replaced_stays(data, saved, tmp_path, monkeypatch):
    folder = copy_of(saved, tmp_path)
    rename = Path.rename

    def failing(path, target):
        if path == folder / "_unfinished" / "checkpoint-4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    trainer = make_trainer(data, folder, **SAVING)
    with pytest.raises(WriteError, match="checkpoint-4: not written"):
        trainer.train()
    assert trainer._problem_of(folder / "checkpoint-4") is None


# ------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("file", ["optimizer_of_vocabulary.safetensors", "shard/rows.distcp"])
def test_any_file_of_a_checkpoint_is_missed(file, data, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    checkpoint = folder / "checkpoint-6"
    sizes = json.loads((checkpoint / "files.json").read_text())
    assert sizes == {
        path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != "files.json"
    }
    (checkpoint / "files.json").write_text(json.dumps({**sizes, file: 3}))
    trainer = make_trainer(data, folder, **SAVING)
    assert trainer._problem_of(checkpoint) == f"there is no {file} in it"
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_text("ab")
    assert trainer._problem_of(checkpoint).startswith(f"{file} is cut short")


def test_a_checkpoint_of_an_earlier_version_is_resumed(data, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    for checkpoint in folder.glob("checkpoint-*"):
        remove(checkpoint / "files.json")
    trainer = make_trainer(data, folder, **SAVING)
    assert trainer._newest_whole_checkpoint() == str(folder / "checkpoint-6")


def chosen(rank, folder):
    """What each of two processes resumes from, of which the second sees less of the disk."""
    trainer = make_trainer(make_data(), folder, **SAVING)
    assert trainer.accelerator.num_processes == 2
    if rank:
        trainer._problem_of = lambda checkpoint: "not seen yet"
    named = f"{folder}/checkpoint-4"
    found = [trainer._checkpoint_of_first_process(wanted) for wanted in (True, named)]
    if not rank:
        trainer._problem_of = lambda checkpoint: "damaged"
    for wanted in (True, named):
        with pytest.raises(ArgumentError) as caught:
            trainer.train(resume_from_checkpoint=wanted)
        found.append(str(caught.value))
    return found


def test_all_processes_resume_from_what_the_first_one_sees(saved):
    folder = str(saved[0])
    first, second = in_processes(chosen, 2, folder)
    assert first[:2] == second[:2] == [f"{folder}/checkpoint-6", f"{folder}/checkpoint-4"]
    assert "checkpoint-6: damaged" in first[2]
    assert "None" in first[2]
    assert "the first process found none that is whole" in second[2]
    assert "checkpoint-4': damaged" in first[3]
    assert "the first process found it damaged" in second[3]


def test_other_processes_remove_nothing(data, tmp_path):
    trainer = make_trainer(data, tmp_path, **SAVING)
    trainer.is_local_process_zero = lambda: False
    with trainer._saving(tmp_path / "_unfinished"):
        (tmp_path / "_unfinished").mkdir()
    assert names(tmp_path) == ["_unfinished"]
