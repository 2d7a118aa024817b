"""Tiny random models of many architectures, and batches for them."""

from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)

VOCABULARY = 99
WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**WIDE, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
STATE_SPACE = {**WIDE, "state_size": 4, "num_attention_heads": None}
OLD = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "n_inner": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Architecture(NamedTuple):
    """A type of model and what makes it tiny; `scale` enlarges weights so that a softcap bends."""

    model_type: str
    config: dict
    scale: float = 1.0


CAUSAL = {
    "llama": Architecture("llama", GROUPED),
    "llama_tied": Architecture("llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": Architecture("mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": Architecture("qwen2", GROUPED),
    "qwen3": Architecture("qwen3", GROUPED),
    "qwen3_moe": Architecture("qwen3_moe", {**GROUPED, **EXPERTS, "output_router_logits": True}),
    "gemma": Architecture("gemma", GROUPED),
    "gemma2": Architecture("gemma2", {**GROUPED, "final_logit_softcapping": 3.0}, 20.0),
    "gemma3_text": Architecture("gemma3_text", {**GROUPED, "final_logit_softcapping": 3.0}, 20.0),
    "gemma4_text": Architecture(
        "gemma4_text",
        {
            **GROUPED,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 4,
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
            "final_logit_softcapping": 3.0,
        },
        20.0,
    ),
    "granite": Architecture("granite", {**GROUPED, "logits_scaling": 0.3}),
    "granitemoe": Architecture(
        "granitemoe",
        {**GROUPED, **LOCAL_EXPERTS, "logits_scaling": 0.3, "output_router_logits": True},
    ),
    "cohere": Architecture("cohere", {**GROUPED, "logit_scale": 0.4}),
    "cohere2": Architecture("cohere2", {**GROUPED, "logit_scale": 0.4}),
    "recurrent_gemma": Architecture(
        "recurrent_gemma",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "logits_soft_cap": 3.0,
            "lru_width": 16,
            "attention_window_size": 8,
        },
        20.0,
    ),
    "mixtral": Architecture(
        "mixtral", {**GROUPED, **LOCAL_EXPERTS, "output_router_logits": True}
    ),
    "gpt2": Architecture("gpt2", OLD),
    "gpt_neox": Architecture("gpt_neox", WIDE),
    "gptj": Architecture("gptj", {**OLD, "rotary_dim": 4}),
    "opt": Architecture("opt", {**WIDE, "ffn_dim": 32, "word_embed_proj_dim": 8}),
    "bloom": Architecture("bloom", OLD),
    "falcon": Architecture("falcon", WIDE),
    "falcon_h1": Architecture(
        "falcon_h1",
        {
            **GROUPED,
            "mamba_d_ssm": 16,
            "mamba_n_heads": 2,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_chunk_size": 4,
            "lm_head_multiplier": 0.7,
        },
    ),
    "phi": Architecture("phi", WIDE),
    "phi3": Architecture("phi3", {**WIDE, "num_key_value_heads": 1}),
    "olmo2": Architecture("olmo2", GROUPED),
    "stablelm": Architecture("stablelm", GROUPED),
    "starcoder2": Architecture("starcoder2", GROUPED),
    "mamba": Architecture("mamba", STATE_SPACE),
    "mamba2": Architecture(
        "mamba2", {**STATE_SPACE, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    ),
    "rwkv": Architecture("rwkv", {**WIDE, "attention_hidden_size": 16, "context_length": 32}),
    "xlstm": Architecture(
        "xlstm",
        {
            **WIDE,
            "hidden_size": 64,  # the cache rounds up to 64
            "qk_dim_factor": 1.0,
            "num_heads": 2,
            "num_blocks": 2,
            "output_logit_soft_cap": 3.0,
        },
        20.0,
    ),
    "nanochat": Architecture("nanochat", {**GROUPED, "final_logit_softcapping": 3.0}, 20.0),
    "hyperclovax": Architecture("hyperclovax", {**GROUPED, "logits_scaling": 0.3}),
    "minicpm3": Architecture(
        "minicpm3",
        {
            **WIDE,
            "num_key_value_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "dim_model_base": 4,
        },
    ),
    "modernbert-decoder": Architecture("modernbert-decoder", WIDE),
    "deepseek_v3": Architecture(
        "deepseek_v3",
        {
            **WIDE,
            "num_key_value_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "glm4": Architecture("glm4", GROUPED),
    "gpt_oss": Architecture("gpt_oss", {**GROUPED, **LOCAL_EXPERTS, "output_router_logits": True}),
}  # fmt: skip
MASKED = {
    "bert": Architecture("bert", WIDE),
    "roberta": Architecture("roberta", WIDE),
    "modernbert": Architecture("modernbert", WIDE),
    "distilbert": Architecture(
        "distilbert",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "hidden_dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 64,
        },
    ),
}


def build(name):
    """Return the model called `name` in a table, training, without dropout, in float32."""
    torch.manual_seed(5)
    causal = name in CAUSAL
    architecture = CAUSAL[name] if causal else MASKED[name]
    config = AutoConfig.for_model(architecture.model_type, **architecture.config)
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model = auto.from_config(config)
    return prepared(model, architecture.scale)


def prepared(model, scale=1.0):
    """Return `model` with random weights everywhere (biases too), training, without dropout."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.05)
        model.get_output_embeddings().weight.mul_(scale)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def batch(n_sequences=2, length=9, seed=3):
    """Return token ids and labels, some of them -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (n_sequences, length), generator=generator)
    labels = ids.clone()
    labels[0, 2:4] = -100
    labels[-1, -2:] = -100
    return {"input_ids": ids, "labels": labels}
