"""A recommender whose items try to be more than text, for the pages."""

import torch

from hf_rece import ItemTokenizer, RecommenderConfig, RecommenderModel, SASRecConfig

HOSTILE = [
    "<img src=x onerror=window.broken=1>",
    "<script>window.broken=2</script>",
    "${window.broken=3}",
    "{{#with this}}{{constructor}}{{/with}}",
    "`;window.broken=4;`",
    "</style><svg onload=window.broken=5>",
    "\" onmouseover='window.broken=6' data-place=\"0",
    "\\u0060 <b>**bold**</b> &amp;",
]


def shop():
    """Return a model of some 60 items, whose recommendations are those of random weights."""
    items = [*HOSTILE, *(f"tool {number}" for number in range(50))]
    backbone = SASRecConfig(hidden_size=8, max_position_embeddings=10, initializer_range=0.5)
    torch.manual_seed(0)
    model = RecommenderModel(RecommenderConfig(backbone=backbone, vocab_size=len(items) + 1))
    model.tokenizer = ItemTokenizer(items=items)
    return model.eval()
