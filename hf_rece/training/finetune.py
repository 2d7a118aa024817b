"""Fine-tune a language model with TRL's data handling; needs the extra `trl`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from trl.scripts.utils import ScriptArguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from hf_rece.data.text import read_rows
from hf_rece.errors import ArgumentError, DataError
from hf_rece.models.loading import check_shards, hub_options
from hf_rece.models.settings import refused_code
from hf_rece.training.pretrain import LanguageModelRun, load_tokenizer, run_training
from hf_rece.training.sft import LargeVocabSFTConfig, LargeVocabSFTTrainer


@dataclass
class FinetuneDataArguments(ScriptArguments):
    """Which dataset to fine-tune on: of the Hub, or of files."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a dataset, in place of train_file."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "File: .jsonl, .json, .csv, .parquet or .txt."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File to evaluate on. None: 1/20 is held out."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column to use as TRL's prompt."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column to use as TRL's completion."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder, Hub id or tokenizer.json, where the model brings none."},
    )


@dataclass(repr=False)
class FinetuneDefaults(LargeVocabSFTConfig):
    """LargeVocabSFTConfig with a folder to write to."""

    output_dir: str | None = field(
        default="finetuned", metadata={"help": "Folder of the checkpoints and of what is saved."}
    )


def finetune(
    data: FinetuneDataArguments, model: ModelConfig, training: LargeVocabSFTConfig
) -> LanguageModelRun:
    """Fine-tune, evaluate before and after, save the adapter or model, and a card, in output_dir.

    A folder with a configuration and no weights is trained from random weights. Weights are read
    from safetensors only, and from the model's own folder.

    Raises:
        ArgumentError: for arguments that do not fit together, and for a model that needs code of
            its repository, without trust_remote_code.
        DataError: for a dataset that cannot be used, and weights that an index names elsewhere.
    """
    if model.model_name_or_path is None:
        raise ArgumentError("model_name_or_path", None, "none is named", "Pass a folder or Hub id")
    set_seed(training.seed)
    training.include_num_input_tokens_seen = "non_padding"  # for tokens/s
    train, evaluation = _datasets(data, training.seed)
    tokenizer = load_tokenizer(
        data.tokenizer or model.model_name_or_path, trust_remote_code=training.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = LargeVocabSFTTrainer(
        _language_model(model, training),
        training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    return run_training(trainer, base_model=model.model_name_or_path)


def _language_model(model: ModelConfig, training: LargeVocabSFTConfig) -> Any:
    source = str(model.model_name_or_path)
    options: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype or "auto",
        "use_safetensors": True,
        **cast("dict[str, Any]", training.model_init_kwargs or {}),
    }
    training.model_init_kwargs = None  # used up here
    check_shards(source, hub_options(options))
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if any(folder.glob("*model*.bin")):
            raise ArgumentError(
                "model_name_or_path",
                source,
                "its weights are pickled",
                "Save it with save_pretrained, which writes safetensors",
            )
        trusted = {"trust_remote_code": training.trust_remote_code}
        with refused_code("model_name_or_path", source):
            config = AutoConfig.from_pretrained(source, **trusted)
            return AutoModelForCausalLM.from_config(config, dtype=model.dtype, **trusted)
    quantization = get_quantization_config(model)
    if quantization is not None:
        options["quantization_config"] = quantization
    with refused_code("model_name_or_path", source):
        return AutoModelForCausalLM.from_pretrained(source, **options)


def _datasets(data: FinetuneDataArguments, seed: int) -> tuple[Dataset, Dataset]:
    if bool(data.dataset_name) == bool(data.train_file):
        raise ArgumentError(
            "train_file", data.train_file, "needs exactly one source", "Pass it or dataset_name"
        )
    if data.dataset_name:
        parts = load_dataset(data.dataset_name, name=data.dataset_config)
        train, evaluation = parts[data.dataset_train_split], parts.get(data.dataset_test_split)
    else:
        train = read_rows(str(data.train_file))
        evaluation = read_rows(data.validation_file) if data.validation_file else None
    if evaluation is None:
        held_out = train.train_test_split(test_size=1 / 20, seed=seed)
        train, evaluation = held_out["train"], held_out["test"]
    return _renamed(train, data), _renamed(evaluation, data)


def _renamed(dataset: Dataset, data: FinetuneDataArguments) -> Dataset:
    wanted = {"prompt": data.prompt_column, "completion": data.completion_column}
    names = {column: name for name, column in wanted.items() if column not in (None, name)}
    missing = [column for column in names if column not in dataset.column_names]
    if missing:
        raise DataError(
            "dataset",
            f"no column {', '.join(map(str, missing))}",
            f"Pass columns among {', '.join(dataset.column_names)}",
        )
    return dataset.rename_columns(names)
