"""Every architecture family as a tiny random network: what its config needs, and whether its examples can share a row.

`packs` is what the library did when each was tried by hand, not what the probe says: OPT, Falcon, BioGPT and the like make
positions of their own, ALiBi and recurrences know none, GPT-OSS and AFMoE drop the restarts on the way to their masks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.data.tokens import TokenGroup
from posttrain.models.policy import Policy

BASE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
LLAMA = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
GPT = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOW = {"sliding_window": 8}
MOE = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {**BASE, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
       "v_head_dim": 8}  # fmt: skip
DEEPSEEK = {**MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
            "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
SSM = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "eos_token_id": 1}
HYBRID = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

PACKS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied-mqa": {**LLAMA, "model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": {**LLAMA, **WINDOW, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**LLAMA, **WINDOW, "final_logit_softcapping": 3.0, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {**LLAMA, **WINDOW},
    "ministral": {**LLAMA, **WINDOW},
    "gpt2": GPT,
    "gpt_bigcode": {**GPT, "multi_query": True},
    "gpt_neo": {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8, "eos_token_id": 1,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "bos_token_id": 1},
    "gpt_neox": {**BASE, "use_parallel_residual": True},
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4, "n_ctx": 64},
    "ctrl": {**GPT, "dff": 48},
    "phi": {**BASE, "partial_rotary_factor": 0.5},
    "phi3": {**LLAMA, **WINDOW},
    "cohere": {**LLAMA, "logit_scale": 0.25},
    "cohere2": {**LLAMA, **WINDOW, "logit_scale": 0.25},
    "granite": {**LLAMA, "logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "granitemoe": {**MOE, "num_local_experts": 4, "logits_scaling": 4.0},
    "hyperclovax": {**LLAMA, "logits_scaling": 0.5},
    "minicpm3": MLA,
    "olmo2": LLAMA,
    "olmo3": {**LLAMA, **WINDOW},
    "glm": LLAMA,
    "glm4": LLAMA,
    "stablelm": {**LLAMA, "partial_rotary_factor": 0.5},
    "starcoder2": {**LLAMA, **WINDOW},
    "persimmon": BASE,
    "nemotron": LLAMA,
    "nanochat": {**LLAMA, "final_logit_softcapping": 2.0},
    "smollm3": LLAMA,
    "exaone4": {**LLAMA, **WINDOW},
    "apertus": LLAMA,
    "mixtral": {**MOE, "num_local_experts": 4, **WINDOW},
    "olmoe": {**MOE, "num_experts": 4},
    "qwen3_moe": {**MOE, "num_experts": 4},
    "jetmoe": {**MOE, "num_local_experts": 4, "kv_channels": 8},
    "dbrx": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    "llama4_text": {**MOE, "num_local_experts": 4, "intermediate_size_mlp": 32, "attention_chunk_size": 8},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "gemma3": {
        "text_config": {**LLAMA, **WINDOW, "model_type": "gemma3_text"}, "image_token_index": 98, "boi_token_index": 97,
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "image_size": 28, "patch_size": 14}},
}  # fmt: skip
APART: dict[str, dict[str, Any]] = {
    "opt": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},  # the post-norm variant
    "falcon": {**BASE, "multi_query": True, "new_decoder_architecture": False},
    "falcon-alibi": {**BASE, "model_type": "falcon", "alibi": True},
    "biogpt": BASE,
    "openai-gpt": {key: value for key, value in GPT.items() if not key.endswith("token_id")},
    "xglm": {"vocab_size": 99, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
             "max_position_embeddings": 64},
    "gpt_oss": {**MOE, "num_local_experts": 4, **WINDOW},
    "afmoe": {**MOE, "num_experts": 4, **WINDOW, "num_dense_layers": 1},
    "bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1},
    "mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": SSM,
    "falcon_mamba": SSM,
    "mamba2": {**SSM, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "rwkv": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "xlstm": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 16},
    "recurrent_gemma": {**LLAMA, "num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32,
                        "block_types": ["recurrent", "recurrent", "attention"]},
    "qwen3_next": {**MOE, **DELTA, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**LLAMA, **DELTA},
    "olmo_hybrid": {**LLAMA, **DELTA},
    "jamba": {**MOE, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {**LLAMA, **HYBRID, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "falcon_h1": {**LLAMA, **HYBRID, "mamba_d_ssm": 32, "mamba_d_head": 8, "lm_head_multiplier": 0.5},
    "granitemoehybrid": {**MOE, **HYBRID, "num_local_experts": 4, "mamba_d_head": 16, "shared_intermediate_size": 16,
                         "layer_types": ["mamba", "attention"]},
    "nemotron_h": {**LLAMA, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
                   "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"]},
    "minimax": {**MOE, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
}  # fmt: skip
FAMILIES = {**PACKS, **APART}

REFUSED: dict[str, dict[str, Any]] = {
    "modernbert-decoder": {
        **BASE,
        "local_attention": 16,
        "cls_token_id": 1,
        "sep_token_id": 1,
    },  # layers above its decoder
    "doge": {**LLAMA, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},  # routes a token by other tokens
}


def network(name: str, attention: str | None = None, scores: bool = False, **changes: Any) -> Any:
    """Random weights with enough spread for masks, caps and scales to show in the logits, or in one score."""
    settings = {**FAMILIES, **REFUSED}[name] | changes
    torch.manual_seed(0)
    kind = {"attn_implementation": attention} if attention else {}
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    if scores:
        config.num_labels = 1
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, **kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@cache
def policy(name: str) -> Policy:
    """Read-only: tests that train or adapt make their own."""
    return Policy(network(name))


def group(seed: int, length: int, prompt: int = 3) -> TokenGroup:
    ids = torch.randint(3, 95, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    answer = length - prompt
    return TokenGroup(str(seed), str(seed), ids[:prompt], [ids[prompt:]], [[True] * answer], [answer], [answer], "{}")


GROUPS = [group(0, 5), group(1, 9), group(2, 24)]
"""The last is three windows long."""


def own_logprobs(model: Any, example: TokenGroup) -> torch.Tensor:
    """Of one example's targets, by the model's own logits on it alone."""
    ids = torch.tensor([example.prompt + example.responses[0]])
    logits = model(input_ids=ids, use_cache=False).logits.float()
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    return each[len(example.prompt) - 1 :]
