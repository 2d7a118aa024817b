"""Train a language model from scratch without logits.

    python recipes/language_model/pretrain.py --tokenizer gpt2_tokenizer.json \
        --train_file book.txt --config_overrides '{"hidden_size": 320, "num_hidden_layers": 8}' \
        --loss_type stratified --output_dir runs/pretrain

Every flag of transformers.TrainingArguments works; a YAML file may hold them.
"""

from hf_rece.cli import pretrain

if __name__ == "__main__":
    pretrain()
