"""A recommender over any decoder."""

from typing import get_args

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, Qwen3Config

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig
from hf_rece.errors import ArgumentError, DataError
from hf_rece.losses import LossName

ITEMS = [f"item {i}" for i in range(29)]
LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
BACKBONES = {
    "sasrec": lambda: SASRecConfig(hidden_size=16, max_position_embeddings=20),
    "sasrec without dropout": lambda: SASRecConfig(
        hidden_size=16, max_position_embeddings=20, dropout=0.0
    ),
    "bert": lambda: BertConfig(**BERT),
    "gpt2": lambda: GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=20),
    "llama": lambda: LlamaConfig(**LLAMA),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=8),
}
every_backbone = pytest.mark.parametrize("backbone", ["sasrec", "gpt2", "llama", "qwen3"])


def make(backbone="sasrec", **knobs):
    torch.manual_seed(0)
    config = RecommenderConfig(backbone=BACKBONES[backbone](), vocab_size=30, **knobs)
    model = RecommenderModel(config)
    model.tokenizer = ItemTokenizer(items=ITEMS)
    return model


def batch():
    ids = torch.randint(1, 30, (3, 7))
    labels = torch.randint(1, 30, (3, 7))
    labels[1, 4:] = -100
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.backbone.config.dropout = 0.0
    return model


def dense_loss(model, inputs):
    hidden = model.backbone(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    logits = model.item_head(hidden)
    logits[..., 0] = -torch.inf
    return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


@every_backbone
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_equal_the_dense_ones(backbone, tied, bias):
    model, inputs = make(backbone, tie_word_embeddings=tied, output_bias=bias), batch()
    without_dropout(model.train())
    losses, grads = [], []
    for loss in (lambda: model(**inputs).loss, lambda: dense_loss(model, inputs)):
        model.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


@every_backbone
@pytest.mark.parametrize("tied", [True, False])
def test_survives_saving_and_auto_classes(backbone, tied, tmp_path):
    model = make(
        backbone, tie_word_embeddings=tied, loss_type="rece", loss_kwargs={"n_rounds": 3}
    ).eval()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is RecommenderModel
    assert (again.config.loss_type, again.config.loss_kwargs) == ("rece", {"n_rounds": 3})
    assert (again.item_head.weight is again.get_input_embeddings().weight) == tied
    assert AutoTokenizer.from_pretrained(tmp_path).items == again.tokenizer.items == ITEMS
    inputs = batch()
    assert again(**inputs).loss == model(**inputs).loss


@pytest.mark.parametrize("loss_type", get_args(LossName))
def test_every_loss_trains(loss_type):
    model = make(loss_type=loss_type).train()
    model(**batch()).loss.backward()
    assert model.get_input_embeddings().weight.grad.count_nonzero() > 0


def test_negatives_by_sequence_reach_the_loss():
    knobs = {"shared_by": "sequence", "n_negatives": 3}
    model = make(loss_type="sampled_softmax", loss_kwargs=knobs).train()
    model(**batch()).loss.backward()


def test_evaluation_is_exact_whatever_the_training_loss():
    inputs = batch()
    model = make(loss_type="bce").eval()
    torch.testing.assert_close(model(**inputs).loss, dense_loss(model, inputs))


@pytest.mark.parametrize("knob", [{"logit_scale": 5.0}, {"logit_softcap": 0.05}])
def test_evaluation_shapes_logits_as_training_does(knob):
    inputs = batch()
    model = make("sasrec without dropout", loss_kwargs=knob)
    plain = make("sasrec without dropout").eval()(**inputs).loss
    evaluated = model.eval()(**inputs).loss
    torch.testing.assert_close(evaluated, model.train()(**inputs).loss)
    assert (evaluated - plain).abs() > 1e-4


BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}


@pytest.mark.parametrize("backbone", ["sasrec", "gpt2", "llama", "qwen3", "bert"])
def test_no_backbone_sees_later_items(backbone):
    model = make(backbone).eval()
    ids = torch.randint(2, 30, (2, 8))
    changed = ids.clone()
    changed[:, 5:] = 1
    mask = torch.ones_like(ids)
    early, same = (
        model(input_ids=each, attention_mask=mask).last_hidden_state[:, :5]
        for each in (ids, changed)
    )
    torch.testing.assert_close(early, same, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "model_type", ["albert", "bart", "cpmant", "modernbert", "t5", "whisper", "xlm", "xlnet"]
)
def test_a_backbone_that_is_no_decoder_is_refused(model_type):
    with pytest.raises(ArgumentError, match=f"backbone='{model_type}': no decoder"):
        RecommenderConfig(backbone={"model_type": model_type})


@every_backbone
def test_padding_on_either_side_gives_the_same_last_state(backbone):
    model = make(backbone).eval()
    ids = torch.randint(1, 30, (1, 5))
    zeros, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)

    def states(*order):
        parts = {"ids": (ids, ones), "pad": (zeros, zeros)}
        inputs, mask = (torch.cat([parts[name][i] for name in order], 1) for i in (0, 1))
        return model(input_ids=inputs, attention_mask=mask).last_hidden_state[mask == 1]

    torch.testing.assert_close(states("pad", "ids"), states("ids", "pad"), atol=1e-5, rtol=1e-5)


def test_the_losses_of_evaluation_have_the_loss_as_their_mean():
    output = make().eval()(**batch())
    assert output.losses.shape == (18,)
    torch.testing.assert_close(output.losses.mean(), output.loss)


def test_num_items_in_batch_scales_the_loss():
    model, inputs = make().eval(), batch()
    n_labels = (inputs["labels"] != -100).sum()
    torch.testing.assert_close(
        model(**inputs, num_items_in_batch=2 * n_labels).loss, model(**inputs).loss / 2
    )


class WidestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_of_tokens_times_items_is_made(training):
    torch.manual_seed(0)
    config = RecommenderConfig(
        backbone=SASRecConfig(hidden_size=4, num_hidden_layers=1, max_position_embeddings=20),
        vocab_size=20_000,
        loss_kwargs={"tile_bytes": 40_000} if training else None,
    )
    model = RecommenderModel(config).train(training)
    ids = torch.randint(1, 20_000, (64, 20))
    with WidestTensor() as widest:
        model(input_ids=ids, labels=ids, rank_k=None if training else 5)
    assert widest.numel < ids.numel() * 20_000 / 10


def test_ranks_and_top_k_equal_the_dense_ones():
    model = make().eval()
    ids = torch.randint(1, 30, (5, 7))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = torch.arange(1, 6)
    seen = torch.tensor([[9, 8, -1]] * 5)
    output = model(input_ids=ids, labels=labels, seen_ids=seen, rank_k=4)
    logits = model.item_head(model.backbone(input_ids=ids).last_hidden_state[:, -1])
    logits[:, [0, 8, 9]] = -torch.inf
    own = logits.gather(1, labels[:, -1:])
    assert torch.equal(output.greater, (logits > own).sum(1))
    assert torch.equal(output.topk_ids, logits.topk(4).indices)
    assert output.tied.count_nonzero() == 0


def test_a_constant_model_ties_with_everything():
    model = make().eval()
    model.item_head.weight.data[:] = 0.3
    output = model(**batch(), rank_k=2)
    assert (output.greater == 0).all()
    assert (output.tied == 28).all()


def test_logits_only_on_request():
    inputs = batch()
    assert make().eval()(**inputs).logits is None
    assert make().eval()(**inputs, output_logits=True).logits.shape == (3, 7, 30)


# -------------------------------------------------------------------------------- recommending


def scores_of(model, history):
    ids = torch.tensor([model.tokenizer.convert_items_to_ids(history)])
    return model.item_head(model.backbone(input_ids=ids).last_hidden_state[0, -1])[1:]


@every_backbone
def test_recommends_the_best_unseen_items_in_the_users_ids(backbone):
    model = make(backbone).eval()
    histories = [["item 1", "item 2", "item 3"], ["item 9"]]
    for history, answer in zip(histories, model.recommend(histories, k=5), strict=True):
        scores = scores_of(model, history)
        scores[[ITEMS.index(item) for item in history]] = -torch.inf
        best = scores.topk(5)
        assert [found.item for found in answer] == [ITEMS[i] for i in best.indices]
        assert [found.score for found in answer] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_seen_items_return_when_asked_for():
    model = make().eval()
    (answer,) = model.recommend([ITEMS], k=29, filter_seen=False)
    assert {found.item for found in answer} == set(ITEMS)


def test_allowed_items_restrict_the_answer():
    (answer,) = make().recommend([["item 1"]], k=5, allowed_items=["item 1", "item 7", "item 8"])
    assert {found.item for found in answer} == {"item 7", "item 8"}


def test_unknown_items_are_named_and_the_rest_answered():
    model = make()
    with pytest.warns(UserWarning, match=r"2 items are not in the vocabulary.*'x', 'y'"):
        answers = model.recommend([["item 1", "x"], ["y"], ["item 2"]], k=2)
    assert [len(answer) for answer in answers] == [2, 0, 2]
    assert answers[0] == model.recommend([["item 1"]], k=2)[0]


def test_long_histories_keep_the_most_recent_items():
    model = make()
    long = ITEMS[:25]
    (answer,) = model.recommend([long], k=3)
    scores = scores_of(model.eval(), long[-20:])
    scores[:25] = -torch.inf
    assert [found.item for found in answer] == [ITEMS[i] for i in scores.topk(3).indices]


def test_recommending_leaves_the_mode_as_it_was():
    model = make().train()
    model.recommend([["item 1"]])
    assert model.training


def test_a_failure_leaves_the_mode_as_it_was():
    model = make().train()
    model.item_head = None
    with pytest.raises(AttributeError):
        model.recommend([["item 1"]])
    assert model.training


def test_the_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="'x'") as caught:
        make().recommend([["item 1", "x"]])
    assert caught[0].filename == __file__


def test_batches_do_not_change_the_answers():
    model = make()
    histories = [ITEMS[i : i + 1 + i % 5] for i in range(20)]
    one, other = (model.recommend(histories, k=4, batch_size=size) for size in (1, 64))
    assert [[f.item for f in a] for a in one] == [[f.item for f in a] for a in other]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.recommend([["item 1"]], k=0), "k=0"),
        (lambda model: model.recommend([[]], k=0), "k=0"),
        (lambda model: model.recommend([["item 1"]], batch_size=0), "batch_size=0"),
        (lambda model: model.recommend(["item 1", "item 2"]), r"histories=.*Pass \[history\]"),
        (lambda model: model.recommend("item 1"), "histories='item 1'"),
        (lambda model: model.recommend([1, 2]), r"histories=\[1, 2\]"),
        (lambda model: model.recommend([["item 1"]], allowed_items=["z"]), "'z'"),
        (
            lambda model: setattr(model, "tokenizer", None) or model.recommend([["item 1"]]),
            "tokenizer=None",
        ),
    ],
)
def test_bad_requests_are_named(call, message):
    with pytest.raises((ArgumentError, DataError), match=message):
        call(make())


def test_a_bad_loss_fails_when_the_configuration_is_made():
    with pytest.raises(ArgumentError, match="loss_type='recee'"):
        RecommenderConfig(loss_type="recee")
    with pytest.raises(ArgumentError, match="n_round"):
        RecommenderConfig(loss_type="rece", loss_kwargs={"n_round": 3})
    with pytest.raises(ArgumentError, match="reduction='none'"):
        RecommenderConfig(loss_kwargs={"reduction": "none"})


def test_a_configuration_leaves_the_backbones_as_it_was():
    backbone = SASRecConfig(vocab_size=7)
    one, other = (RecommenderConfig(backbone=backbone, vocab_size=size) for size in (30, 99))
    assert (backbone.vocab_size, one.backbone.vocab_size, other.backbone.vocab_size) == (7, 30, 99)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_on_the_item_head_is_trained():
    peft = pytest.importorskip("peft")
    model = without_dropout(make(tie_word_embeddings=False))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["item_head"]))
    lora_b = model.item_head.lora_B["default"].weight
    torch.nn.init.normal_(lora_b)
    inputs = batch()
    loss = adapted.train()(**inputs).loss
    wanted = dense_loss(model, inputs)
    torch.testing.assert_close(loss, wanted)
    (got,) = torch.autograd.grad(loss, lora_b)
    (want,) = torch.autograd.grad(wanted, lora_b)
    assert float(want.abs().max()) > 0
    torch.testing.assert_close(got, want)


def test_excluded_ids_add_to_padding():
    model = without_dropout(make(loss_kwargs={"excluded_ids": [3]}))
    inputs = batch()
    inputs["labels"][inputs["labels"] == 3] = 4
    hidden = (
        model.train()
        .backbone(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        .last_hidden_state
    )
    logits = model.item_head(hidden)
    logits[..., [0, 3]] = -torch.inf
    wanted = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(model(**inputs).loss, wanted)
