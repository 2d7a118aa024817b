"""Model cards: what they say, that the Hub's own checks take them, and that edits survive."""

import re
import warnings

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from hf_rece import (
    ItemTokenizer,
    RecommenderConfig,
    RecommenderModel,
    RecommenderTrainer,
    RecommenderTrainingArguments,
    SASRecConfig,
    generate_interactions,
    leave_one_out_split,
)
from hf_rece.card import PAPERS, Card, citations, is_generated, write_card
from hf_rece.errors import DataError

RESULT = EvalResult(
    task_type="t", dataset_type="d", dataset_name="d", metric_type="m", metric_value=0.5
)


def card(**changes):
    facts = {"name": "a", "library": "hf_rece", "sections": {"": "Text.", "Use": "`code`"}}
    return Card(**{**facts, "tags": ("hf_rece", "loss:rece"), "results": [RESULT], **changes})


def test_a_card_is_updated_as_long_as_nobody_edits_it(tmp_path):
    assert write_card(tmp_path, card())
    assert write_card(tmp_path, card(name="b"))
    text = (tmp_path / "README.md").read_text()
    assert "# b\n" in text
    assert is_generated(text)
    (tmp_path / "README.md").write_text(text.replace("Text.", "My text."))
    with pytest.warns(UserWarning, match="edited by hand and stays"):
        assert not write_card(tmp_path, card(name="c"))
    assert "My text." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("text", ["", "# Mine\n", "---\nlicense: mit\n---\n# Mine\n"])
def test_a_readme_of_somebody_stays(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.warns(UserWarning, match="remove it to get a model card"):
        assert not write_card(tmp_path, card())
    assert (tmp_path / "README.md").read_text() == text


def test_metadata_that_others_added_stays(tmp_path):
    write_card(tmp_path, card())
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("tags:", "license: mit\ntags:\n- mine", 1))
    write_card(tmp_path, card(tags=("hf_rece", "loss:sce"), results=[]))
    data = ModelCard.load(path).data
    assert data.license == "mit"
    assert data.tags == ["hf_rece", "loss:sce", "mine"]
    assert data.eval_results is None


def test_metadata_that_is_no_yaml_is_somebodys(tmp_path):
    write_card(tmp_path, card())
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("tags:", "tags: [", 1))
    with pytest.warns(UserWarning, match="stays"):
        write_card(tmp_path, card())


def test_line_ends_of_another_system_are_no_edit(tmp_path):
    write_card(tmp_path, card())
    text = (tmp_path / "README.md").read_text().replace("\n", "\r\n")
    assert is_generated(text.replace("\r\n", "\n"))
    assert is_generated(text)


def test_papers_are_cited_once_and_with_their_number():
    assert citations(["rece", "rece", "no such paper"]).count("arXiv") == 1
    for text, number in PAPERS.values():
        assert re.fullmatch(r"\d{4}\.\d{5}", number)
        assert text.endswith(".")


# ------------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after training and testing, and the log."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "shop"
    log = generate_interactions(60, 40)
    tokenizer = ItemTokenizer.from_interactions(log)
    splits = leave_one_out_split(log, tokenizer)
    config = RecommenderConfig(
        backbone=SASRecConfig(hidden_size=8, max_position_embeddings=10),
        vocab_size=len(tokenizer),
        item_embedding={"type": "compositional", "compression": 2, "codes": "id"},
    )
    model = RecommenderModel(config)
    model.tokenizer = tokenizer
    arguments = RecommenderTrainingArguments(
        output_dir=str(folder),
        max_length=10,
        num_train_epochs=2,
        loss_type="rece",
        loss_kwargs={"n_rounds": 3},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@10",
        use_cpu=True,
        hub_token="hf_secret",
        report_to="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RecommenderTrainer(
            model, arguments, train_dataset=splits["train"], eval_dataset=splits["validation"]
        )
        trainer.train()
        trainer.evaluate(splits["test"], metric_key_prefix="test")
        trainer.save_model()
    return trainer, log


def test_the_card_says_what_was_done(trained):
    trainer, log = trained
    text = ModelCard.load(f"{trainer.args.output_dir}/README.md").text
    assert "# shop" in text
    assert '`rece` with knobs `{"n_rounds": 3}`' in text
    assert "leave-one-out split" in text
    assert f"60 users, {log['item_id'].n_unique()} items and {len(log):,} interactions" in text
    assert re.search(r"SHA-256 [0-9a-f]{64}", text)
    assert re.search(r"epochs: 2, steps: \d+", text)
    assert re.search(r"seconds on .*; peak memory [\d,]+ MiB", text)
    assert "items of the history left out" in text
    for paper in ("1808.09781", "2408.02354", "1909.02107"):
        assert paper in text
    assert "2409.18721" not in text
    assert text.count("pip install hf_rece") == 1


def test_the_metrics_are_a_valid_model_index(trained):
    trainer, _ = trained
    data = ModelCard.load(f"{trainer.args.output_dir}/README.md").data
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    again = trainer.evaluate()
    assert found["validation", "ndcg@10"] == pytest.approx(again["eval_ndcg@10"], abs=1e-6)
    assert found["validation", "loss"] == pytest.approx(again["eval_loss"], abs=1e-4)
    assert ("test", "hr@10") in found
    assert (data.library_name, data.model_name) == ("hf_rece", "shop")
    assert {"hf_rece", "sequential-recommendation", "loss:rece"} <= set(data.tags)


def test_other_data_are_not_taken_for_validation(trained):
    trainer, _ = trained
    before = trainer.model.config.training_run["metrics"]["validation"]
    trainer.evaluate(trainer.eval_dataset.select(range(5)))
    assert trainer.model.config.training_run["metrics"]["validation"] == before


def test_neither_card_nor_configuration_holds_a_path_or_token(trained):
    trainer, _ = trained
    from pathlib import Path

    for path in Path(trainer.args.output_dir).glob("*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            assert "hf_secret" not in text, path.name
            assert str(path.parents[1]) not in text, path.name
        elif path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path.name


def test_the_example_of_the_card_works(trained, monkeypatch, capsys):
    trainer, _ = trained
    from pathlib import Path

    folder = Path(trainer.args.output_dir)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("Recommendation(item=") == 3


def test_what_is_known_of_a_run_survives_loading(trained, tmp_path):
    trainer, _ = trained
    model = RecommenderModel.from_pretrained(trainer.args.output_dir)
    model.save_pretrained(tmp_path / "shop")
    copies = [
        (folder / "README.md").read_text()
        for folder in (tmp_path / "shop", type(tmp_path)(trainer.args.output_dir))
    ]
    assert copies[0] == copies[1]


def test_the_fingerprint_tells_logs_apart():
    log = generate_interactions(30, 20)
    tokenizer = ItemTokenizer.from_interactions(log)
    first, again = (leave_one_out_split(log, tokenizer)["train"].info.description for _ in "ab")
    fewer = leave_one_out_split(log.head(len(log) - 1), tokenizer)["train"].info.description
    assert first == again
    assert first.split("SHA-256")[1] != fewer.split("SHA-256")[1]


def test_sparse_learning_is_said_and_cited(tmp_path):
    config = RecommenderConfig(backbone=SASRecConfig(hidden_size=8), vocab_size=9)
    config.training_run = {"density": 0.2}
    RecommenderModel(config).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "20% of the weights" in text
    assert "2402.02855" in text


def test_a_path_of_the_backbone_is_not_saved(tmp_path):
    SASRecConfig(hidden_size=8).save_pretrained(tmp_path / "backbone")
    backbone = SASRecConfig.from_pretrained(tmp_path / "backbone")
    RecommenderConfig(backbone=backbone, vocab_size=9).save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_a_readme_that_is_not_text_is_named(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"README\.md: not UTF-8"):
        write_card(tmp_path, card())
    assert (tmp_path / "README.md").read_bytes() == b"\xff"


@pytest.mark.parametrize("run", [{"metrics": "x"}, {"seconds": 3}, {"metrics": {"test": [1]}}])
def test_a_record_of_another_form_is_named(run, tmp_path):
    model = RecommenderModel(RecommenderConfig(vocab_size=12, training_run=run))
    with pytest.raises(DataError, match="training_run: damaged, or written by hand"):
        model.save_pretrained(tmp_path)
    assert RecommenderModel.from_pretrained(tmp_path).config.training_run == run
