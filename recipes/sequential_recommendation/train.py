"""Train a sequential recommender on a log and print its test metrics beside most-popular.

    python recipes/sequential_recommendation/train.py --output_dir runs/synthetic
    cd recipes/sequential_recommendation
    python train.py beauty.yaml --train_file amazon_beauty.parquet

The same as `hf-rece train`. Every flag of transformers.TrainingArguments works; --help lists them.
"""

from hf_rece.cli import train

if __name__ == "__main__":
    train()
