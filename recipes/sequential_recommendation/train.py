"""Train a sequential recommender on a log and print its test metrics beside most-popular.

    python recipes/sequential_recommendation/train.py --output_dir runs/synthetic
    cd recipes/sequential_recommendation
    python train.py beauty.yaml --train_file amazon_beauty.parquet

The same as `hf-rece train`. Every flag of transformers.TrainingArguments works; --help lists them.
"""

from hf_rece.cli import TrainDefaults, parse
from hf_rece.training.run import (
    DataArguments,
    ModelArguments,
    show_metrics,
    show_recommendations,
    train_recommender,
)


def main() -> None:
    data, model, training = parse((DataArguments, ModelArguments, TrainDefaults), None, "train")
    run = train_recommender(data, model, training)
    show_metrics({"most popular": run.baseline, str(run.model.config.loss_type): run.metrics})
    show_recommendations(run)


if __name__ == "__main__":
    main()
