"""Every loss over a vocabulary that is cut over processes equals the loss of one process."""

import warnings

import pytest
import torch

from hf_rece.errors import ArgumentError
from hf_rece.losses import build_loss
from hf_rece.ops import native, stream_torch
from hf_rece.ops.lookup import lookup
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.shards import ShardedRows, shard_classes
from hf_rece.ops.smaller_tiles import restore_tile_bytes
from hf_rece.ops.stream import TokenStatistics
from hf_rece.ops.topk import label_rank, streamed_topk
from hf_rece.ops.vocab_mesh import vocab_mesh
from tests.processes import assert_messages_fit, in_processes, record_messages

N_CLASSES, WIDTH, IGNORED = 203, 8, -100
LOSSES = {
    "cross_entropy": ("cross_entropy", {}),
    "cross_entropy, small tiles": ("cross_entropy", {"tile_bytes": 20_000}),
    "rece": ("rece", {"n_buckets": 6, "n_rounds": 3}),
    "rece, defaults": ("rece", {}),
    "sce": ("sce", {"bucket_size_y": 20}),
    "sce, small tiles": ("sce", {"bucket_size_y": 20, "mix": False, "tile_bytes": 4000}),
    "stratified": ("stratified", {"n_groups": 5, "n_hard": 11, "n_random": 23}),
    "stratified, all hard": ("stratified", {"n_hard": 300}),
    "sampled_softmax": ("sampled_softmax", {"n_negatives": 30, "logq": True}),
    "in_batch": ("sampled_softmax", {"sampler": "in_batch", "n_negatives": 9, "logq": True}),
    "by sequence": ("sampled_softmax", {"n_negatives": 12, "shared_by": "sequence"}),
    "bce": ("bce", {"n_negatives": 5}),
    "gbce": ("gbce", {"n_negatives": 40, "sampler": "log_uniform"}),
}
SHAPED = {"logit_scale": 1.3, "logit_softcap": 4.0, "excluded_ids": [0, 7, 150]}
# Sequences of each process; the batch of one process is all of them.
SEQUENCES = {2: [5, 2], 4: [3, 0, 1, 3]}


def batch():
    """Return hidden (7, 4, D), labels (7, 4) some of which are ignored, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 4, WIDTH, generator=generator)
    labels = torch.randint(8, N_CLASSES, (7, 4), generator=generator)
    labels[labels == 150] = 151
    labels[:, 0] = IGNORED
    labels[3] = IGNORED  # in 4 processes, the only sequence of the third: it has no token
    weight = torch.randn(N_CLASSES, WIDTH, generator=generator)
    return hidden, labels, weight, torch.randn(N_CLASSES, generator=generator)


def step(loss, hidden, rows, labels, tensors, reduction, generator=None):
    value = loss(
        hidden, rows, labels, bias=tensors[1],
        generator=generator or torch.Generator().manual_seed(3),
        ignore_index=IGNORED, reduction=reduction, **SHAPED,
    )  # fmt: skip
    value.sum().backward()
    return [value.detach(), hidden.grad, *(tensor.grad for tensor in tensors)]


def one_process(reduction="mean"):
    found = {}
    for name, (loss_type, knobs) in LOSSES.items():
        hidden, labels, weight, bias = batch()
        tensors = [weight.requires_grad_(), bias.requires_grad_()]
        found[name] = step(
            build_loss(loss_type, **knobs), hidden.requires_grad_(), weight, labels, tensors,
            reduction,
        )  # fmt: skip
    return found


def some_processes(rank, sizes, vocab_parallel_size=None):
    mesh = None if vocab_parallel_size is None else vocab_mesh(vocab_parallel_size)
    shards = shard_classes(N_CLASSES, mesh)
    assert shards.world_size * shards.data_size == len(sizes)
    assert shards.rank + shards.world_size * shards.data_rank == rank
    own, classes = (
        slice(sum(sizes[:rank]), sum(sizes[: rank + 1])),
        slice(shards.first, shards.stop),
    )
    found = {}
    for name, (loss_type, knobs) in LOSSES.items():
        hidden, labels, weight, bias = batch()
        tensors = [part[classes].clone().requires_grad_() for part in (weight, bias)]
        found[name] = step(
            build_loss(loss_type, **knobs), hidden[own].clone().requires_grad_(),
            ShardedRows(DenseRows(tensors[0]), shards), labels[own], tensors, "mean",
        )  # fmt: skip
        for tensor in tensors:
            shards.average_over_data(tensor.grad)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def of_processes(request):
    world_size = request.param
    return in_processes(some_processes, world_size, SEQUENCES[world_size])


@pytest.fixture(scope="module")
def of_one():
    return one_process()


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_processes_is_the_loss_of_one(of_processes, of_one, name):
    losses = torch.stack([found[name][0] for found in of_processes])
    torch.testing.assert_close(losses.mean(), of_one[name][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_one_process_as_ddp_averages_them(of_processes, of_one, name):
    _, wanted_hidden, wanted_weight, wanted_bias = of_one[name]
    hidden, weight, bias = (
        torch.cat([found[name][i] for found in of_processes]) for i in (1, 2, 3)
    )
    assert wanted_weight.abs().max() > 1e-4
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(hidden / len(of_processes), wanted_hidden, **close)
    torch.testing.assert_close(weight, wanted_weight, **close)
    torch.testing.assert_close(bias, wanted_bias, **close)


def variants(rank, sizes):
    """Losses (own tokens) without reduction, and with the default generator; errors of one."""
    shards = shard_classes(N_CLASSES)
    own, classes = (
        slice(sum(sizes[:rank]), sum(sizes[: rank + 1])),
        slice(shards.first, shards.stop),
    )
    hidden, labels, weight, _ = batch()
    hidden, labels = hidden[own], labels[own]
    rows = ShardedRows(DenseRows(weight[classes]), shards)
    stratified = build_loss("stratified", n_groups=5, n_hard=11, n_random=23, reduction="none")
    torch.manual_seed(5 if rank == 0 else 77)
    found = {"none": [stratified(hidden, rows, labels) for _ in range(2)]}
    found["next"] = torch.rand(3)
    found["sum"] = build_loss("cross_entropy", reduction="sum")(hidden, rows, labels)
    found["budget"] = build_loss("sce", memory_budget="32MiB")(
        hidden, rows, labels, num_items_in_batch=14, generator=torch.Generator().manual_seed(0)
    )
    in_half = ShardedRows(DenseRows(weight[classes].bfloat16()), shards)
    found["bfloat16"] = build_loss("cross_entropy", reduction="sum")(
        hidden.bfloat16(), in_half, labels
    )
    half = hidden.bfloat16().requires_grad_()
    build_loss("cross_entropy", reduction="sum")(half, in_half, labels).backward()
    found["bfloat16 gradient"] = half.grad
    found["nobody"] = build_loss("rece")(hidden, rows, torch.full_like(labels, IGNORED))
    bad = {
        "labels": lambda: build_loss("rece")(hidden, rows, labels + (rank == 0) * N_CLASSES),
        "statistics": lambda: build_loss("rece")(
            hidden, rows, labels, statistics=TokenStatistics()
        ),
        "sparse_grad": lambda: build_loss("sce")(hidden, rows, labels, sparse_grad=True),
        "bias": lambda: build_loss("sce")(
            hidden, rows, labels, bias=torch.zeros(N_CLASSES if rank == 0 else shards.n_local)
        ),
        "hidden": lambda: build_loss("rece")(hidden[..., rank == 0 :], rows, labels),
        "excluded_ids": lambda: build_loss("bce", excluded_ids=[N_CLASSES - 1 + rank])(
            hidden, rows, labels
        ),
    }
    for name, call in bad.items():
        with pytest.raises(ArgumentError) as caught:
            call()
        found[name] = str(caught.value)
    return found


def messages(rank, sizes):
    """Return the messages of a step of each loss, and of searches, whatever tokens and tiles."""
    shards = shard_classes(N_CLASSES)
    sent = record_messages()
    hidden, labels, weight, _ = batch()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = {}
    for name, (loss_type, knobs) in LOSSES.items():
        for tile_bytes in (2000, 10**7):
            local = weight[shards.first : shards.stop].clone().requires_grad_()
            states = hidden[own].clone().requires_grad_()
            rows = ShardedRows(DenseRows(local), shards)
            loss = build_loss(loss_type, **{**knobs, "tile_bytes": tile_bytes})
            loss(states, rows, labels[own]).backward()
            found.setdefault(name, []).append(sent.copy())
            sent.clear()
    queries, targets = hidden.flatten(0, 1), labels.flatten().clamp(min=0)
    searches = {
        "lookup": lambda tile_bytes: lookup(rows, labels[own].clamp(min=0)).sum().backward(),
        "topk": lambda tile_bytes: streamed_topk(queries, rows, 5, tile_bytes=tile_bytes),
        "rank": lambda tile_bytes: label_rank(queries, rows, targets, tile_bytes=tile_bytes),
    }
    for name, search in searches.items():
        for tile_bytes in (2000, 10**7):
            search(tile_bytes)
            found.setdefault(name, []).append(sent.copy())
            sent.clear()
    return found


def test_messages_depend_on_no_data_and_fit_together():
    uneven, alone = (in_processes(messages, 2, sizes) for sizes in ([5, 2], [0, 7]))
    for name in uneven[0]:
        every = [sent for found in (*uneven, *alone) for sent in found[name]]
        names = [[message for message, *_ in sent] for sent in every]
        assert all(each == names[0] for each in names), name
        assert {"topk": 2, "rank": 4}.get(name, 6) <= len(names[0]) <= 12, names[0]
        for of_processes in (uneven, alone):
            for of_tiles in zip(*(found[name] for found in of_processes), strict=True):
                assert_messages_fit(of_tiles)
            assert of_processes[0][name][0] == of_processes[0][name][1], "a tile is in a message"


@pytest.fixture(scope="module")
def of_two():
    return in_processes(variants, 2, [7, 0])


def test_losses_of_own_tokens_are_those_of_one_process(of_two):
    hidden, labels, weight, _ = batch()
    torch.manual_seed(5)
    loss = build_loss("stratified", n_groups=5, n_hard=11, n_random=23, reduction="none")
    for step_number in range(2):  # the second step draws on where the first stopped
        wanted = loss(hidden, weight, labels)
        got = torch.cat([found["none"][step_number] for found in of_two])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_draws_together_leave_the_other_processes_generators_alone(of_two):
    torch.manual_seed(77)
    assert torch.equal(of_two[1]["next"], torch.rand(3))


def test_sums_add_up(of_two):
    hidden, labels, weight, _ = batch()
    loss = build_loss("cross_entropy", reduction="sum")
    total = sum(found["sum"] for found in of_two)
    torch.testing.assert_close(total, loss(hidden, weight, labels))
    torch.testing.assert_close(
        sum(found["bfloat16"] for found in of_two).float(),
        loss(hidden.bfloat16(), weight.bfloat16(), labels).float(),
        rtol=1e-3,
        atol=1e-3,
    )


def test_gradients_of_bfloat16_states_are_sent_back(of_two):
    hidden, labels, weight, _ = batch()
    half = hidden.bfloat16().requires_grad_()
    build_loss("cross_entropy", reduction="sum")(half, weight.bfloat16(), labels).backward()
    got = torch.cat([found["bfloat16 gradient"] for found in of_two])
    torch.testing.assert_close(got, half.grad, rtol=0.02, atol=0.02)


def test_a_memory_budget_gives_all_processes_the_same_plan(of_two):
    assert of_two[0]["budget"] > 0
    assert of_two[1]["budget"] == 0  # it has no token


def test_a_batch_without_labels_has_loss_zero(of_two):
    assert [found["nobody"] for found in of_two] == [0, 0]


@pytest.mark.parametrize("name", ["labels", "statistics", "sparse_grad"])
def test_what_is_wrong_with_all_tokens_is_said_in_all(of_two, name):
    assert name in of_two[0][name]
    assert of_two[0][name] == of_two[1][name]


@pytest.mark.parametrize(("name", "wrong"), [("bias", 0), ("hidden", 0), ("excluded_ids", 1)])
def test_what_is_wrong_in_one_process_is_said_in_all(of_two, name, wrong):
    own, other = of_two[wrong][name], of_two[1 - wrong][name]
    assert own.startswith(f"{name}=")
    assert other == f"process={wrong}: {own} Correct it there."


# ---------------------------------------------------------------------------- several groups


@pytest.fixture(scope="module")
def of_two_groups():
    """What two groups of two processes find: tokens of sequences 0 to 2, and 3 to 6."""
    return in_processes(some_processes, 4, SEQUENCES[4], 2)


def one_group(name, group):
    """What one process finds of the tokens of a group, by draws of that group."""
    hidden, labels, weight, bias = batch()
    own = slice(0, 3) if group == 0 else slice(3, 7)
    generator = torch.Generator().manual_seed(3)
    if group:
        generator.manual_seed(int(torch.randint(2**62, (), generator=generator)) + group)
    tensors = [weight.requires_grad_(), bias.requires_grad_()]
    loss_type, knobs = LOSSES[name]
    return step(
        build_loss(loss_type, **knobs), hidden[own].requires_grad_(), weight, labels[own], tensors,
        "mean", generator,
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_each_group_has_the_loss_of_its_tokens_by_draws_of_its_own(of_two_groups, name):
    wanted = [one_group(name, group) for group in (0, 1)]
    for group, want in enumerate(wanted):
        both = torch.stack([found[name][0] for found in of_two_groups[2 * group :][:2]])
        torch.testing.assert_close(both.mean(), want[0], rtol=1e-5, atol=1e-5)
    close = {"rtol": 1e-5, "atol": 1e-7}
    for i in (2, 3):
        mean = (wanted[0][i] + wanted[1][i]) / 2
        for group in (0, 1):
            got = torch.cat([found[name][i] for found in of_two_groups[2 * group :][:2]])
            torch.testing.assert_close(got, mean, **close)


# ------------------------------------------------------------------------------------- no memory


def starved(rank, sizes):
    """Return what some_processes does, where the first one finds no memory twice a step."""
    native.library = lambda: None
    said = {}
    for name in ("batched_product", "batched_transposed_product"):
        original = getattr(stream_torch, name)

        def fail_once(*args, name=name, original=original):
            if rank == 0 and name not in said:
                said[name] = True
                raise MemoryError
            return original(*args)

        setattr(stream_torch, name, fail_once)
    found, every = {}, dict(LOSSES)
    for name, knobs in every.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            LOSSES.clear()
            LOSSES[name] = knobs
            found |= some_processes(rank, sizes)
        found[name].append([str(w.message) for w in caught])
        said.clear()
        restore_tile_bytes()
    return found


def test_a_process_that_runs_out_of_memory_walks_again_while_the_others_wait(of_one):
    of_two = in_processes(starved, 2, SEQUENCES[2])
    for name, wanted in of_one.items():
        hidden, weight, bias = (torch.cat([found[name][i] for found in of_two]) for i in (1, 2, 3))
        close = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(hidden / 2, wanted[1], **close)
        torch.testing.assert_close(weight, wanted[2], **close)
        torch.testing.assert_close(bias, wanted[3], **close)
        assert ["out of memory" in text for text in of_two[0][name][4]] == [True, True], name
        assert not of_two[1][name][4]
