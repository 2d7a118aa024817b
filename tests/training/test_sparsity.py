"""Dynamic sparse learning with Trainer."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_rece.data.item_tokenizer import ItemTokenizer
from hf_rece.data.splits import leave_one_out_split
from hf_rece.data.synthetic import generate_interactions
from hf_rece.errors import ArgumentError
from hf_rece.models.recommender import RecommenderConfig, RecommenderModel
from hf_rece.models.sasrec import SASRecConfig
from hf_rece.models.sparse_checkpoint import holds
from hf_rece.training.args import RecommenderTrainingArguments
from hf_rece.training.sparsity import (
    DynamicSparsityCallback,
    SparsityArguments,
    clear_moments,
    cosine_ratio,
    sparse_weights,
)
from hf_rece.training.trainer import RecommenderTrainer
from tests.processes import findings_of_two_processes

TABLE = "backbone.embed_tokens.weight"


def make_data():
    log = generate_interactions(70, 60, seed=0)
    tokenizer = ItemTokenizer.from_interactions(log)
    return tokenizer, leave_one_out_split(log, tokenizer)


data = pytest.fixture(make_data, scope="module", name="data")


def make_model(n_tokens=61):
    torch.manual_seed(0)
    backbone = SASRecConfig(hidden_size=16, max_position_embeddings=10, dropout=0.0)
    return RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=n_tokens))


def make_trainer(data, folder, *callbacks, model=None, **arguments):
    tokenizer, splits = data
    settings = {
        "output_dir": str(folder),
        "max_length": 10,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 70,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **arguments,
    }
    return RecommenderTrainer(
        make_model(len(tokenizer)) if model is None else model,
        RecommenderTrainingArguments(**settings),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        callbacks=list(callbacks),
    )


def make_language_trainer(folder, *callbacks, model=None, **arguments):
    """A plain Trainer of a model that hf_rece knows nothing of."""
    if model is None:
        torch.manual_seed(0)
        shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **shape, **heads))
    ids = torch.randint(0, 40, (64, 6), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {
        "output_dir": str(folder),
        "max_steps": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        **arguments,
    }
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=list(callbacks),
    )


TRAINERS = {
    "recommender": lambda folder, *rest, **more: make_trainer(make_data(), folder, *rest, **more),
    "llama": make_language_trainer,
}


def assert_same_weights(left, right):
    for (name, one), (_, other) in zip(
        left.named_parameters(), right.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


class Watch(TrainerCallback):
    """Calls look(step, optimizer) after each step; comes after the callback that it watches."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look(state.global_step, kwargs["optimizer"])


# -------------------------------------------------------------------------------- masks in training


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_exactly_the_share_is_active_at_every_step(data, optim, tmp_path):
    sparse = DynamicSparsityCallback(0.3, update_interval=2)
    wanted, seen = {}, []

    def look(step, optimizer):
        for name, weight in sparse.weights.items():
            wanted.setdefault(name, round(0.3 * weight.numel()))
            assert sparse.masks[name].sum() == wanted[name]
            assert holds(sparse.masks[name], weight)
        seen.append(torch.cat([mask.flatten() for mask in sparse.masks.values()]))

    settings = {"optim": optim, "weight_decay": 0.1}
    make_trainer(data, tmp_path, sparse, Watch(look), **settings).train()
    moves = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moves == [True, False, True, False, True, False, False]  # none two steps before the end


def test_tables_and_linear_layers_are_sparse_and_nothing_else(data, tmp_path):
    sparse = DynamicSparsityCallback(0.3)
    trainer = make_trainer(data, tmp_path, sparse, max_steps=1)
    trainer.train()
    dense = {name for name, p in trainer.model.named_parameters() if (p != 0).all()}
    assert sparse.masks.keys().isdisjoint(dense)
    assert TABLE in sparse.masks
    assert "backbone.embed_positions.weight" in dense
    assert all(p.ndim == 2 for name, p in trainer.model.named_parameters() if name in sparse.masks)
    n_matrices = sum(p.ndim == 2 for p in trainer.model.parameters())
    assert len(sparse.masks) == n_matrices - 1  # all but the positions


def test_moments_of_moved_and_inactive_weights_are_zero(data, tmp_path):
    sparse = DynamicSparsityCallback(0.3, update_interval=2)
    before = {}

    def look(step, optimizer):
        for name, weight in sparse.weights.items():
            state = optimizer.state[weight]
            grown = sparse.masks[name] & ~before.get(name, sparse.masks[name])
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not state[moment][~sparse.masks[name]].any()
                assert not state[moment][grown].any()
            assert state["exp_avg"].any()
            before[name] = sparse.masks[name].clone()

    make_trainer(data, tmp_path, sparse, Watch(look)).train()


def test_clearing_spares_what_stays():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight], amsgrad=True)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    moved = torch.tensor([[True, False], [False, False]])
    clear_moments(optimizer, weight, moved)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert (optimizer.state[weight][name] == 0).equal(moved), name
    assert optimizer.state[weight]["step"] == 1


def test_densities_are_given_by_table(data, tmp_path):
    shares = {"item_head.*": 0.1, "*q_proj*": 0.5, "*": 1.0}
    sparse = DynamicSparsityCallback(shares)  # item_head is tied to the input table
    make_trainer(data, tmp_path, sparse, max_steps=1).train()
    found = {name: mask.float().mean().item() for name, mask in sparse.masks.items()}
    assert found.pop(TABLE) == pytest.approx(0.1, abs=1e-3)
    for name, share in found.items():
        assert share == pytest.approx(0.5 if "q_proj" in name else 1.0, abs=1e-2)


def test_what_no_pattern_names_stays_dense(data, tmp_path):
    sparse = DynamicSparsityCallback({TABLE: 0.1})
    make_trainer(data, tmp_path, sparse, max_steps=1).train()
    assert list(sparse.masks) == [TABLE]


def test_redistribution_moves_density_but_not_the_total(data, tmp_path):
    sparse = DynamicSparsityCallback(0.3, redistribute=True, update_interval=1)
    counts = []

    def look(step, optimizer):
        counts.append({name: int(mask.sum()) for name, mask in sparse.masks.items()})

    make_trainer(data, tmp_path, sparse, Watch(look)).train()
    wanted = sum(round(0.3 * weight.numel()) for weight in sparse.weights.values())
    assert {sum(count.values()) for count in counts} == {wanted}
    assert counts[-1] != counts[0]


def test_the_history_tells_density_and_what_was_ever_active(data, tmp_path):
    sparse = DynamicSparsityCallback(0.3, update_interval=2)
    trainer = make_trainer(data, tmp_path, sparse, logging_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["density"] == pytest.approx(0.3, abs=1e-3) for entry in logged)
    shares = [entry["ever_active"] for entry in logged]
    assert shares[0] == pytest.approx(0.3, abs=1e-3)
    assert shares[1] > shares[0]
    assert shares == sorted(shares)


def test_the_share_that_moves_falls_as_a_cosine():
    assert cosine_ratio(0.0, 0.5, 0.005) == pytest.approx(0.5)
    assert cosine_ratio(0.5, 0.5, 0.005) == pytest.approx(0.2525)
    assert cosine_ratio(1.0, 0.5, 0.005) == pytest.approx(0.005)


# ------------------------------------------------------------------------------------ the gradients


def play(gradients, optimizer=torch.optim.SGD, **knobs):
    """Feed gradients to a callback, a step each; return the masks before and after, the weights."""
    model = nn.Sequential(nn.Linear(gradients.shape[1], 1, bias=False))
    sparse = DynamicSparsityCallback(0.5, update_interval=len(gradients), **knobs)
    optimizer = optimizer(model.parameters(), lr=0.0)
    state = SimpleNamespace(global_step=0, max_steps=1000)
    arguments = SimpleNamespace(seed=0)
    known = {"model": model, "optimizer": optimizer}
    sparse.on_train_begin(arguments, state, None, **known)
    before = sparse.masks["0.weight"].clone()
    for gradient in gradients:
        model[0].weight.grad = gradient[None].clone()
        sparse.on_pre_optimizer_step(arguments, state, None, **known)
        optimizer.step()
        sparse.on_optimizer_step(arguments, state, None, **known)
        state.global_step += 1
        sparse.on_step_end(arguments, state, None, **known)
    return before[0], sparse.masks["0.weight"][0], model[0].weight[0]


def test_weights_grow_where_earlier_batches_pulled():
    gradients = torch.zeros(4, 8)
    before, *_ = play(gradients)
    inactive = (~before).nonzero()[:2, 0]
    gradients[0, inactive] = 1.0  # an item of the first batch only
    gradients[3, ~before] += 0.1  # the last batch pulls all a little
    before, after, _ = play(gradients)
    assert (after & ~before).nonzero()[:, 0].tolist() == inactive.tolist()


def test_a_steady_pull_outbids_larger_noise():
    steady, noisy = (~play(torch.zeros(4, 8))[0]).nonzero()[:2, 0]
    gradients = torch.zeros(4, 8)
    gradients[:, noisy] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    gradients[:, steady] = 0.1
    before, after, _ = play(gradients, initial_ratio=0.25)
    assert (after & ~before).nonzero()[:, 0].tolist() == [steady]


def test_an_update_forgets_the_gradients_that_it_used(data, tmp_path):
    sparse = DynamicSparsityCallback(0.3, update_interval=2)
    empty = []

    def look(step, optimizer):
        empty.append(not any(total.any() for total in sparse.gradients.values()))

    make_trainer(data, tmp_path, sparse, Watch(look)).train()
    assert empty == [False, True, False, True, False, True, False, False]


class Restless(torch.optim.SGD):
    """Moves every weight at every step, gradient or not."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight += 1.0


def test_inactive_weights_stay_zero_whatever_the_optimizer_does():
    before, after, weight = play(torch.zeros(3, 8), optimizer=Restless)
    assert before.sum() == after.sum() == 4
    assert not weight[~after].any()
    assert weight[before & after].min() > 2


def test_a_step_that_overflowed_leaves_no_trace():
    steady, overflown = (~play(torch.zeros(4, 8))[0]).nonzero()[:2, 0]
    gradients = torch.zeros(4, 8)
    gradients[0, overflown] = torch.inf
    gradients[1, overflown] = torch.nan
    gradients[:, steady] = 0.1
    before, after, _ = play(gradients, initial_ratio=0.25)
    assert (after & ~before).nonzero()[:, 0].tolist() == [steady]


def test_gradient_accumulation_grows_what_one_large_batch_grows(data, tmp_path):
    sums = []
    for batch, accumulation in ((16, 1), (4, 4)):
        sparse = DynamicSparsityCallback(0.3)
        make_trainer(
            data,
            tmp_path,
            sparse,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            max_grad_norm=0.0,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
        ).train()
        sums.append(sparse.gradients[TABLE])
    assert sums[0].abs().max() > 1e-3
    torch.testing.assert_close(sums[1], sums[0], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("kind", "accumulation", "knobs"),
    [
        ("recommender", 1, {}),
        ("recommender", 2, {"redistribute": True}),
        ("llama", 2, {}),
        ("llama", 1, {"redistribute": True}),
    ],
)
def test_resuming_gives_the_same_weights(kind, accumulation, knobs, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 5,  # between two updates
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8,
    }
    runs = []
    for name in ("whole", "resumed"):
        sparse = DynamicSparsityCallback(0.3, update_interval=2, **knobs)
        trainer = TRAINERS[kind](tmp_path / name, sparse, **settings)
        resumed = str(tmp_path / "whole" / "checkpoint-5") if name == "resumed" else None
        trainer.train(resume_from_checkpoint=resumed)
        runs.append((trainer, sparse))
    (whole, one), (again, other) = runs
    assert_same_weights(whole.model, again.model)
    for name in one.weights:
        assert torch.equal(one.masks[name], other.masks[name])
        assert torch.equal(one.gradients[name], other.gradients[name])
        assert torch.equal(one.ever_active[name], other.ever_active[name])


def test_a_recommender_resumes_with_the_masks_of_its_weights_alone(data, tmp_path):
    sparse = DynamicSparsityCallback(0.3)
    settings = {"save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    make_trainer(data, tmp_path, sparse, max_steps=4, **settings).train()
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    again = DynamicSparsityCallback(0.3)
    make_trainer(data, tmp_path, again, seed=5, save_only_model=True).train(
        resume_from_checkpoint=True
    )
    assert all(torch.equal(mask, again.masks[name]) for name, mask in sparse.masks.items())


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_best_model_comes_back_with_its_masks(kind, tmp_path):
    sparse = DynamicSparsityCallback(0.3, update_interval=1)
    best = {}
    trainer = TRAINERS[kind](
        tmp_path,
        sparse,
        Watch(
            lambda step, _: best.setdefault(step, {n: m.clone() for n, m in sparse.masks.items()})
        ),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first checkpoint is the best
    )
    trainer.train()
    assert trainer.state.best_global_step == 3
    for name, weight in sparse.weights.items():
        mask = sparse.masks[name]
        assert holds(mask, weight)
        assert mask.sum() == round(0.3 * weight.numel())
        assert not torch.equal(mask, best[8][name])
        if kind == "recommender":
            assert torch.equal(mask, best[3][name])


def test_a_trained_recommender_is_stored_sparse_and_loads_bit_exact(data, tmp_path):
    sparse = DynamicSparsityCallback(0.3, update_interval=2)
    trainer = make_trainer(data, tmp_path, sparse)
    trainer.train()
    trainer.save_model()
    assert f"{TABLE}:bitmask" in load_file(tmp_path / "model.safetensors")
    again = RecommenderModel.from_pretrained(tmp_path)
    assert_same_weights(trainer.model, again)
    assert all(torch.equal(mask, again.weight_masks[n]) for n, mask in sparse.masks.items())


def test_any_other_model_is_stored_dense(tmp_path):
    trainer = make_language_trainer(tmp_path, DynamicSparsityCallback(0.3, update_interval=2))
    trainer.train()
    trainer.save_model()
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == {name for name, _ in trainer.model.named_parameters()}
    assert_same_weights(trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_loaded_model_trains_on_with_its_masks(data, tmp_path):
    first = DynamicSparsityCallback(0.3, update_interval=2)
    trainer = make_trainer(data, tmp_path, first)
    trainer.train()
    trainer.save_model()
    second = DynamicSparsityCallback(0.3)
    again = RecommenderModel.from_pretrained(tmp_path)
    make_trainer(data, tmp_path, second, model=again, max_steps=1, seed=5).train()
    assert all(torch.equal(mask, second.masks[n]) for n, mask in first.masks.items())


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_twice_goes_on_with_the_masks(kind, tmp_path):
    sparse = DynamicSparsityCallback(0.3)
    trainer = TRAINERS[kind](tmp_path, sparse, max_steps=1)
    trainer.train()
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    trainer.args.seed = 5
    trainer.train()
    assert all(torch.equal(mask, before[name]) for name, mask in sparse.masks.items())


def test_a_trained_model_can_start_from_its_largest_weights(tmp_path):
    sparse = DynamicSparsityCallback(0.3, start="magnitude")
    trainer = make_language_trainer(tmp_path, sparse, learning_rate=0.0, max_steps=1)
    before = {name: weight.abs() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    for name, mask in sparse.masks.items():
        assert before[name][mask].min() >= before[name][~mask].max()


def test_seeds_draw_different_masks(data, tmp_path):
    masks = []
    for seed in (0, 0, 1):
        sparse = DynamicSparsityCallback(0.3)
        make_trainer(data, tmp_path, sparse, max_steps=1, seed=seed).train()
        masks.append(sparse.masks[TABLE])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), {"*": 0.0}, {"a": 0.5, "b": 2}])
def test_density_is_above_0_and_at_most_1(density):
    with pytest.raises(ArgumentError, match=r"density=.*above 0, up to 1"):
        DynamicSparsityCallback(density)


@pytest.mark.parametrize(
    "knob", [{"update_interval": 0}, {"initial_ratio": 1.5}, {"final_ratio": -1}, {"start": "best"}]
)
def test_a_knob_out_of_range_is_refused(knob):
    with pytest.raises(ArgumentError, match=next(iter(knob))):
        DynamicSparsityCallback(0.5, **knob)


def test_a_pattern_that_matches_nothing_lists_what_there_is(data, tmp_path):
    sparse = DynamicSparsityCallback({"*.embed_token.*": 0.1})
    with pytest.raises(ArgumentError, match=rf"'\*\.embed_token\.\*' matches no .*{TABLE}"):
        make_trainer(data, tmp_path, sparse)


def test_a_frozen_model_is_refused():
    with pytest.raises(ArgumentError, match="Unfreeze"):
        sparse_weights(make_model().requires_grad_(False), 0.5)


@pytest.mark.parametrize("kind", TRAINERS)
def test_resuming_without_masks_is_refused(kind, tmp_path):
    TRAINERS[kind](tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = TRAINERS[kind](tmp_path, DynamicSparsityCallback(0.3))
    with pytest.raises(ArgumentError, match=r"resume_from_checkpoint='checkpoint-4'.*masks"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("density", [0.2, {TABLE: 0.3, "*": 0.2}])
def test_resuming_with_another_density_is_refused(data, density, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(data, tmp_path, DynamicSparsityCallback(0.3), **settings).train()
    trainer = make_trainer(data, tmp_path, DynamicSparsityCallback(density))
    with pytest.raises(ArgumentError, match=r"density=.*checkpoint-4 was trained with another"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
def test_sharded_weights_are_refused(sharding):
    arguments = SimpleNamespace(fsdp=None, deepspeed=None)
    setattr(arguments, sharding, "some_settings")
    with pytest.raises(ArgumentError, match=f"{sharding}='some_settings'"):
        DynamicSparsityCallback(0.5).on_init_end(arguments, None, None, model=make_model())


def test_no_density_asks_for_no_callback():
    assert SparsityArguments().callbacks() == []
    (sparse,) = SparsityArguments(0.1, 7, redistribute_density=True).callbacks()
    assert (sparse.density, sparse.update_interval, sparse.redistribute) == ({"*": 0.1}, 7, True)


# -------------------------------------------------------------------------------- several processes


def findings(folder, world):
    """Return a sum that tells masks apart, and the sum of the weights."""
    sparse = DynamicSparsityCallback(0.3, update_interval=2)
    trainer = make_trainer(
        make_data(),
        folder,
        sparse,
        per_device_train_batch_size=16 // world,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    assert trainer.args.world_size == world
    trainer.train()
    places = [int(mask.flatten().nonzero().sum()) for mask in sparse.masks.values()]
    weights = [float(weight.detach().double().sum()) for weight in sparse.weights.values()]
    return [places, weights]


@pytest.mark.slow
def test_two_processes_keep_the_same_weights(tmp_path):
    left, right = findings_of_two_processes("tests.training.test_sparsity", tmp_path)
    assert left == right
