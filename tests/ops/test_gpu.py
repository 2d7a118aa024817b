"""The kernels on a GPU, in the sizes and dtypes that they are used in: pytest -m gpu."""

import pytest
import torch
from torch.nn import functional as F

from hf_rece.losses import build_loss
from hf_rece.ops.rows import DenseRows
from hf_rece.ops.stream import TokenStatistics, choose_kernel

stream_triton = pytest.importorskip("hf_rece.ops.stream_triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

WIDTHS = [64, 128, 256, 1000, 2048, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(width, dtype, n_tokens=700, n_classes=5000, device="cuda"):
    hidden = torch.randn(n_tokens, width, device=device)
    weight = torch.randn(n_classes, width, device=device) * (3 / width**0.5)
    labels = torch.randint(n_classes, (n_tokens,), device=device)
    labels[::9] = -100
    hidden, weight = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, labels


def assert_close_in_norm(found, exact, most):
    assert (found.double() - exact).norm() <= most * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_cross_entropy_equals_a_dense_one_in_float64(width, dtype):
    hidden, weight, labels = problem(width, dtype)
    found = build_loss("cross_entropy", backend="triton")(hidden, weight, labels)
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = F.cross_entropy(exact_inputs[0] @ exact_inputs[1].T, labels)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found, (hidden, weight))
    # Gradients of logits, and then the sums, are rounded to the inputs' dtype.
    most = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for grad, wanted in zip(grads, torch.autograd.grad(exact, exact_inputs), strict=True):
        assert grad.dtype == dtype
        assert_close_in_norm(grad, wanted, most)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1000])
@pytest.mark.parametrize("name", ["rece", "sce", "stratified", "sampled_softmax", "gbce"])
def test_every_loss_equals_that_of_the_torch_backend(name, width, dtype):
    hidden, weight, labels = problem(width, dtype)
    found = []
    for backend in ("torch", "triton"):
        loss = build_loss(name, backend=backend)(
            hidden, weight, labels, generator=torch.Generator("cuda").manual_seed(0)
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    (plain, *plain_grads), (fused, *fused_grads) = found
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    for left, right in zip(fused_grads, plain_grads, strict=True):
        assert_close_in_norm(left, right.double(), 1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("width", [64, 1000])
def test_observations_equal_those_of_the_torch_backend(width):
    seen = []
    hidden, weight, labels = problem(width, torch.bfloat16)
    for backend in ("torch", "triton"):
        seen.append(TokenStatistics())
        build_loss("cross_entropy", backend=backend)(hidden, weight, labels, statistics=seen[-1])
    torch.testing.assert_close(seen[1].entropy, seen[0].entropy, rtol=1e-3, atol=1e-3)
    assert (seen[1].is_top1 == seen[0].is_top1).float().mean() > 0.99


def test_more_numbers_than_fit_into_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("the table, its gradient and the logits of a check take 12 GiB")
    width, n_classes = 256, 2**23 + 100  # 2**31 + 25,600 numbers
    hidden = torch.randn(32, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(n_classes, width, device="cuda", dtype=torch.bfloat16).normal_(std=0.05)
    weight.requires_grad_()
    labels = torch.arange(n_classes - 32, n_classes, device="cuda")
    loss = build_loss("cross_entropy", backend="triton", reduction="sum")(hidden, weight, labels)
    loss.backward()
    with torch.no_grad():
        logits = torch.cat([(hidden.float() @ rows.float().T) for rows in weight.split(2**20)], 1)
        total = logits.logsumexp(1)
        own = logits.gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(loss, (total - own).sum(), rtol=1e-5, atol=1e-3)
        share = (logits[:, -64:] - total[:, None]).exp()
        share[:, -32:] -= torch.eye(32, device="cuda")
        assert_close_in_norm(weight.grad[-64:], (share.T @ hidden.float()).double(), 0.02)


@pytest.mark.parametrize("width", [64, 1024])
def test_half_precision_gradients_take_no_more_room_than_themselves(width):
    hidden, weight, labels = problem(width, torch.bfloat16, 4096, 2**27 // width)
    loss = build_loss("cross_entropy", backend="triton")(hidden, weight, labels)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(loss, (hidden, weight))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < sum(grad.nbytes for grad in grads) + 4 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 1000])
@pytest.mark.parametrize("name", ["cross_entropy", "sce", "stratified"])
def test_the_deterministic_option_repeats_every_bit(name, width, dtype):
    hidden, weight, labels = problem(width, dtype)

    def grads():
        loss = build_loss(name, backend="triton")(
            hidden, weight, labels, generator=torch.Generator("cuda").manual_seed(0)
        )
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [grads() for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(left, right) for left, right in zip(again, runs[0], strict=True))


def test_tensors_of_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    hidden, weight, labels = problem(64, torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    found = build_loss("cross_entropy", backend="triton")(hidden, weight, labels)
    wanted = build_loss("cross_entropy", backend="torch")(hidden, weight, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for left, right in zip(
        *(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, wanted)), strict=True
    ):
        assert left.device == hidden.device
        assert_close_in_norm(left, right.double(), 0.02)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 1000])
def test_autocast_multiplies_float32_tables_in_half_precision(width, dtype, backend):
    hidden, weight, labels = problem(width, torch.float32)
    loss_of = build_loss("cross_entropy", backend=backend)
    with torch.autocast("cuda", dtype=dtype):
        loss = loss_of(hidden, weight, labels)
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in (hidden, weight)]
    exact = F.cross_entropy(rounded[0] @ rounded[1].T, labels)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for grad, wanted in zip(grads, torch.autograd.grad(exact, rounded), strict=True):
        assert grad.dtype == torch.float32
        assert_close_in_norm(grad, wanted, 2 * torch.finfo(dtype).eps)


def test_auto_takes_the_kernels_here():
    hidden, weight, _ = problem(64, torch.bfloat16)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU multiplies no bfloat16")
    assert choose_kernel("auto", hidden, DenseRows(weight)) is stream_triton


def test_mixed_precision_training_uses_half_precision_products(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_rece.training.args import LargeVocabTrainingArguments
    from hf_rece.training.trainer import LargeVocabTrainer

    seen = set()
    forward = stream_triton.forward
    monkeypatch.setattr(
        stream_triton, "forward", lambda s, *a, **k: (seen.add(s.autocast), forward(s, *a, **k))[1]
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=5000, hidden_size=128, intermediate_size=128,
            num_hidden_layers=1, num_attention_heads=2,
        )
    )  # fmt: skip
    row = torch.arange(3, 60).tolist()
    arguments = LargeVocabTrainingArguments(
        output_dir=str(tmp_path), loss_type="cross_entropy", bf16=True, max_steps=30,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = LargeVocabTrainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 64
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == {torch.bfloat16}
    assert losses[-1] < losses[0] - 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
