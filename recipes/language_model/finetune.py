"""Fine-tune a language model without logits: TRL's data handling, PEFT's adapters.

    python recipes/language_model/finetune.py gsm8k.yaml --model_name_or_path my_model \
        --train_file gsm8k_train.jsonl --output_dir runs/finetune

Flags are those of `trl sft`: every flag of TRL's SFTConfig and ModelConfig works, and a YAML file
may hold them. With --use_peft the adapter alone is saved.
"""

from hf_rece.cli import finetune

if __name__ == "__main__":
    finetune()
