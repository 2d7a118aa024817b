"""Models go to a Hub and come back, through the real client."""

import subprocess
import sys
import warnings

import pytest
import torch
from huggingface_hub import (
    HfApi,
    ModelCard,
    create_branch,
    create_repo,
    list_repo_files,
    snapshot_download,
    upload_file,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_rece import (
    ArgumentError,
    HubError,
    ItemTokenizer,
    LargeVocabTrainer,
    LargeVocabTrainingArguments,
    RecommenderConfig,
    RecommenderModel,
    RecommenderTrainer,
    RecommenderTrainingArguments,
    SASRecConfig,
    generate_interactions,
    leave_one_out_split,
    replace_output_head,
)

# How huggingface_hub itself uses its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
HISTORIES = [["item 3", "item 7"], ["item 1"]]
FILES = {"README.md", "config.json", "items.json", "model.safetensors", "tokenizer_config.json"}


@pytest.fixture
def model():
    config = RecommenderConfig(
        backbone=SASRecConfig(hidden_size=8, max_position_embeddings=10), vocab_size=30
    )
    model = RecommenderModel(config).eval()
    model.tokenizer = ItemTokenizer(items=[f"item {i}" for i in range(29)])
    return model


def files(hub, name="user/shop", revision="main"):
    return hub.repositories[name].files(revision)


def test_a_model_comes_back_as_it_was(hub, model):
    model.push_to_hub("shop")
    assert set(files(hub)) >= FILES
    again = RecommenderModel.from_pretrained("user/shop")
    assert again.recommend(HISTORIES, k=5) == model.recommend(HISTORIES, k=5)
    assert type(AutoModel.from_pretrained("user/shop")) is RecommenderModel
    assert AutoTokenizer.from_pretrained("user/shop").items == model.tokenizer.items
    assert AutoConfig.from_pretrained("user/shop").vocab_size == 30
    assert any("/lfs/" in request for request in hub.requests if request.startswith("PUT"))


def test_a_snapshot_is_a_folder_like_any_other(hub, model):
    model.push_to_hub("user/shop")
    again = RecommenderModel.from_pretrained(snapshot_download("user/shop"))
    assert again.recommend(HISTORIES) == model.recommend(HISTORIES)


def test_a_push_is_one_commit_with_the_card(hub, model):
    commit = model.push_to_hub("user/shop", tags="books", commit_message="First")
    assert commit.oid == hub.repositories["user/shop"].branches["main"]
    assert len(hub.repositories["user/shop"].commits) == 2
    card = ModelCard.load("user/shop")
    assert 'from_pretrained("user/shop")' in card.text
    assert card.data.library_name == "hf_rece"
    assert "books" in card.data.tags
    card.validate()


def test_what_an_earlier_version_left_is_not_loaded(hub, model):
    model.push_to_hub("user/shop")
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    for size in ("1KB", "50GB"):
        model.push_to_hub("user/shop", max_shard_size=size)
        again = RecommenderModel.from_pretrained("user/shop")
        assert again.recommend(HISTORIES) == model.recommend(HISTORIES)
        assert ("model.safetensors" in files(hub)) == (size == "50GB")
    model.tokenizer = None
    model.push_to_hub("user/shop")
    assert RecommenderModel.from_pretrained("user/shop").tokenizer is None


def test_a_new_branch_leaves_the_main_one_alone(hub, model):
    create_repo("user/shop")
    model.push_to_hub("user/shop", revision="draft", commit_message=None)
    assert files(hub) == {}
    assert set(list_repo_files("user/shop", revision="draft")) == set(files(hub, revision="draft"))


def test_saving_may_push(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "shop", push_to_hub=True, private=True)
    assert set(files(hub)) >= FILES
    assert hub.repositories["user/shop"].private


def test_a_card_edited_on_the_hub_stays(hub, model):
    model.push_to_hub("user/shop")
    text = files(hub)["README.md"].decode()
    upload_file(
        path_or_fileobj=text.replace("## Use", "## My words").encode(),
        path_in_repo="README.md",
        repo_id="user/shop",
    )
    with pytest.warns(UserWarning, match="edited by hand and stays"):
        model.push_to_hub("user/shop")
    assert b"My words" in files(hub)["README.md"]


def test_a_licence_added_on_the_hub_stays(hub, model):
    model.push_to_hub("user/shop")
    card = ModelCard.load("user/shop")
    card.data.license = "mit"
    card.push_to_hub("user/shop")
    model.config.loss_type = "rece"
    model.push_to_hub("user/shop")
    card = ModelCard.load("user/shop")
    assert card.data.license == "mit"
    assert "`rece`" in card.text


def test_revisions_are_kept_apart(hub, model):
    model.push_to_hub("user/shop")
    before = model.recommend(HISTORIES)
    first = hub.repositories["user/shop"].branches["main"]
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    model.push_to_hub("user/shop", revision="next")
    assert RecommenderModel.from_pretrained("user/shop").recommend(HISTORIES) == before
    for revision, expected in (("next", model.recommend(HISTORIES)), (first, before)):
        again = RecommenderModel.from_pretrained("user/shop", revision=revision)
        assert again.recommend(HISTORIES) == expected
    with pytest.raises(ArgumentError, match=r"revision='gone': user/shop has no such branch"):
        RecommenderModel.from_pretrained("user/shop", revision="gone")


def test_a_private_model_needs_a_token(hub, model, monkeypatch):
    model.push_to_hub("user/shop", private=True)
    again = RecommenderModel.from_pretrained("user/shop")
    assert again.recommend(HISTORIES) == model.recommend(HISTORIES)
    for token in (False, "hf_of_other"):
        with pytest.raises(ArgumentError, match=r"'user/shop': no such folder.*hf auth login"):
            RecommenderModel.from_pretrained("user/shop", token=token, force_download=True)
    monkeypatch.delenv("HF_TOKEN")
    again = RecommenderModel.from_pretrained("user/shop", token="hf_of_user")
    assert again.tokenizer is not None


@pytest.mark.parametrize("token", [False, "hf_wrong", "hf_of_other"])
def test_a_push_without_the_right_is_refused_in_one_message(hub, model, token):
    create_repo("user/shop")
    with pytest.raises(HubError, match=r"user/shop: the Hub lets you write nothing there"):
        model.push_to_hub("user/shop", token=token)
    assert files(hub) == {}


STEPS = ["POST .*/preupload", "POST .*/batch", "PUT /lfs", "POST .*/commit"]


@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_fails_in_the_middle_publishes_nothing(hub, model, step):
    hub.fail(step)
    with pytest.raises(HubError, match=r"user/shop: the upload failed, and nothing .* Push again"):
        model.push_to_hub("user/shop")
    assert files(hub) == {}
    model.push_to_hub("user/shop")
    assert set(files(hub)) >= FILES


def test_a_second_failure_leaves_the_first_version(hub, model):
    model.push_to_hub("user/shop")
    before = dict(files(hub))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    hub.fail("POST .*/commit")
    with pytest.raises(HubError):
        model.push_to_hub("user/shop")
    assert files(hub) == before
    hub.requests.clear()
    model.push_to_hub("user/shop")
    assert not any(request.startswith("PUT") for request in hub.requests)  # the weights are there


def test_no_hub_at_all_is_one_message(hub, model, monkeypatch):
    from huggingface_hub import constants

    hub.close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"shop: the upload failed, and nothing of it"):
        model.push_to_hub("shop")


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder", "no such name"])
def test_an_unknown_repository_is_one_message(hub, name):
    with pytest.raises(ArgumentError, match=r"pretrained_model_name_or_path=.*: no such folder"):
        RecommenderModel.from_pretrained(name)


# --------------------------------------------------------------------------------------- trainers


def recommender_trainer(model, folder, **settings):
    log = generate_interactions(60, 29)
    items = ItemTokenizer.from_interactions(log).items
    model.tokenizer = ItemTokenizer(items=[*items, *(f"new {i}" for i in range(29 - len(items)))])
    splits = leave_one_out_split(log, model.tokenizer)
    arguments = RecommenderTrainingArguments(
        output_dir=str(folder), max_length=10, max_steps=2, use_cpu=True, report_to="none",
        disable_tqdm=True, **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RecommenderTrainer(
            model, arguments, train_dataset=splits["train"], eval_dataset=splits["validation"]
        )


def test_a_trainer_pushes_model_items_and_card(hub, model, tmp_path):
    trainer = recommender_trainer(model, tmp_path / "run", hub_model_id="user/shop")
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(license="mit", dataset_tags="user/log", tags=["books"])
    card = ModelCard.load("user/shop")
    assert (card.data.license, card.data.datasets) == ("mit", "user/log")
    assert "books" in card.data.tags
    assert 'from_pretrained("user/shop")' in card.text
    assert "60 users" in card.text
    assert {r.dataset_split for r in card.data.eval_results} == {"validation"}
    histories = [model.tokenizer.items[:3]]
    again = RecommenderModel.from_pretrained("user/shop")
    assert again.recommend(histories) == model.recommend(histories)


def test_what_a_trainer_publishes_holds_no_token(hub, model, tmp_path):
    settings = {"hub_model_id": "user/shop", "hub_token": "hf_of_user"}
    trainer = recommender_trainer(model, tmp_path / "run", **settings)
    trainer.train()
    trainer.push_to_hub()
    for name, content in files(hub).items():
        assert b"hf_of_user" not in content, name
    assert trainer.args.hub_token == "hf_of_user"


def test_a_trainers_push_fails_in_one_message_and_may_be_repeated(hub, model, tmp_path):
    trainer = recommender_trainer(model, tmp_path / "run", hub_model_id="user/shop")
    trainer.train()
    hub.fail("PUT /lfs")
    with pytest.raises(HubError, match=r"user/shop: the upload failed, and nothing of it"):
        trainer.push_to_hub()
    assert files(hub) == {}
    trainer.push_to_hub()
    assert set(files(hub)) >= FILES


def test_a_readme_of_somebody_is_what_a_trainer_pushes(hub, model, tmp_path):
    trainer = recommender_trainer(model, tmp_path / "run", hub_model_id="user/shop")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "README.md").write_text("# Mine\n")
    with pytest.warns(UserWarning, match=r"README\.md in run was written or edited by hand"):
        trainer.push_to_hub()
    assert files(hub)["README.md"] == b"# Mine\n"


def test_a_trainer_without_a_right_to_the_repository_says_so(hub, model, tmp_path):
    settings = {"hub_model_id": "user/shop", "push_to_hub": True, "hub_token": "hf_wrong"}
    with pytest.raises(HubError, match=r"user/shop: the Hub lets you write nothing there"):
        recommender_trainer(model, tmp_path / "run", **settings)


def test_a_push_that_fails_during_training_is_not_silent(hub, model, tmp_path):
    settings = {"hub_model_id": "user/shop", "push_to_hub": True, "hub_strategy": "every_save"}
    settings |= {"hub_always_push": True, "save_steps": 1}
    trainer = recommender_trainer(model, tmp_path / "run", **settings)
    hub.fail("POST .*/commit")
    with pytest.warns(UserWarning, match=r"a push during training to user/shop failed"):
        trainer.train()
    assert set(files(hub)) >= FILES  # the last push took all of it


# --------------------------------------------------------------------------------- language models


def language_model():
    config = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/lm")
torch.save(model(torch.arange(8)[None]).logits, sys.argv[1])
assert "hf_rece" not in sys.modules
"""


def test_a_model_with_a_replaced_head_is_published_as_an_ordinary_one(hub, tmp_path):
    model = replace_output_head(language_model(), "stratified")
    model.push_to_hub("user/lm")
    assert set(files(hub, "user/lm")) >= {"config.json", "model.safetensors", "README.md"}
    assert b"hf_rece" not in b"".join(files(hub, "user/lm").values())
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path / "logits")], check=True)
    expected = model.eval()(torch.arange(8)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)


def test_a_trainer_publishes_a_language_model_as_an_ordinary_one(hub, tmp_path):
    rows = [list(range(8))] * 4
    trainer = LargeVocabTrainer(
        language_model(),
        LargeVocabTrainingArguments(
            output_dir=str(tmp_path / "lm"), loss_type="rece", max_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, hub_model_id="user/lm",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    config = AutoConfig.from_pretrained("user/lm")
    assert config.architectures == ["LlamaForCausalLM"]
    assert ModelCard.load("user/lm").data.library_name == "transformers"


def test_the_hub_of_the_tests_has_branches(hub):
    create_repo("user/x")
    create_branch("user/x", branch="next")
    assert [b.name for b in HfApi().list_repo_refs("user/x").branches] == ["main", "next"]
