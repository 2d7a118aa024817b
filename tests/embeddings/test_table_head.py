import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_rece import CompositionalEmbedding, LMAEmbedding, replace_output_head
from hf_rece.embeddings.as_rows import as_rows
from hf_rece.embeddings.table_head import TableHead

TABLES = {
    "compositional": lambda: CompositionalEmbedding(500, 32, compression=4),
    "lma": lambda: LMAEmbedding(500, 32, compression=4, n_keys=4),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_terms_agree(name, bias):
    head, hidden = TableHead(TABLES[name](), bias=bias), torch.randn(2, 3, 32)
    if bias:
        torch.nn.init.normal_(head.bias)
    terms = as_rows(head, hidden)
    expected = F.linear(terms.hidden, terms.rows.rows(slice(0, 500)), terms.bias)
    torch.testing.assert_close(head(hidden), expected)


@pytest.mark.parametrize("name", TABLES)
def test_serves_a_language_model(name):
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model, table = AutoModelForCausalLM.from_config(config), TABLES[name]()
    model.set_input_embeddings(table)
    model.lm_head = TableHead(table, tied=True)
    ids = torch.randint(500, (2, 9))
    dense = model.train()(input_ids=ids, labels=ids).loss
    replace_output_head(model, "cross_entropy")
    output = model(input_ids=ids, labels=ids)
    assert output.logits is None
    torch.testing.assert_close(output.loss, dense)
    for own, expected in zip(
        torch.autograd.grad(output.loss, tuple(model.parameters())),
        torch.autograd.grad(dense, tuple(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-4)
