"""TRL's SFT through the same faults as the other trainers: damaged checkpoints, NaN, adapters."""

import pytest
import torch

from hf_rece.errors import NonfiniteError

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from hf_rece import LargeVocabSFTConfig, LargeVocabSFTTrainer  # noqa: E402
from tests.training.test_sft import TEXTS, llama, make_tokenizer  # noqa: E402

tokenizer = pytest.fixture(make_tokenizer, scope="module", name="tokenizer")


def make(tokenizer, folder, adapter=False, **settings):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1) if adapter else None
    arguments = LargeVocabSFTConfig(
        output_dir=str(folder),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        loss_type="stratified",
        loss_kwargs={"n_hard": 8, "n_random": 8},
        **settings,
    )
    return LargeVocabSFTTrainer(
        llama(),
        arguments,
        train_dataset=TEXTS,
        processing_class=tokenizer,
        peft_config=config,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_resuming_past_a_damaged_checkpoint_gives_the_same_weights(adapter, tokenizer, tmp_path):
    first = make(tokenizer, tmp_path, adapter)
    first.train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = make(tokenizer, tmp_path, adapter)
    resumed.train(resume_from_checkpoint=True)
    pairs = zip(first.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    (tmp_path / "README.md").write_text("---\n---\nmine\n")
    resumed.save_model()
    assert "mine" in (tmp_path / "README.md").read_text()
    assert not any(path.name.startswith("_") for path in tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_nan_stops_or_is_skipped(choice, tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path, nonfinite_loss=choice)
    calls = []

    def hook(module, args, output):
        calls.append(module)
        return output * torch.nan if len(calls) == 2 else output

    trainer.model.model.norm.register_forward_hook(hook)
    if choice == "stop":
        with pytest.raises(NonfiniteError, match="step 2: the hidden states"):
            trainer.train()
    else:
        trainer.train()
        assert (trainer.state.global_step, trainer.skipped_steps) == (4, 1)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
