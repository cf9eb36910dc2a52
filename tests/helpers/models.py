"""Tiny random Hugging Face models of every family, with unusual sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 517,  # not a multiple of a power of two
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
# By name, every kind of rope that a family can have among them: transformers' class, without the ending ForCausalLM,
# what its config says further, and the weights' type.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_untied_bf16": ("Qwen3", {"tie_word_embeddings": False, "rope_theta": 5e5}, "bfloat16"),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True, "rope_scaling": LINEAR_ROPE}, "float32"),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "rms_norm_eps": 1e-5}, "float32"),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_scaling": LINEAR_ROPE}, "float32"),
    "llama2_mha": ("Llama", {"num_key_value_heads": 6}, "float32"),
    "llama31_tied": ("Llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE}, "float32"),
    "llama_linear_rope_fp16": ("Llama", {"rope_scaling": LINEAR_ROPE}, "float16"),
    "mistral_nemo": ("Mistral", {"sliding_window": None, "rope_theta": 1e6}, "float32"),
    "mistral_window": ("Mistral", {"sliding_window": 40, "rope_scaling": LINEAR_ROPE}, "float32"),
    "nemotron": ("Nemotron", {"partial_rotary_factor": 0.5, "norm_eps": 1e-5}, "float32"),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 56,
            "norm_topk_prob": True,
            "rope_scaling": LINEAR_ROPE,
        },
        "float32",
    ),
}


def write_model(name: str, folder: Path, **settings: Any) -> None:
    """Write a model with its tokenizer, generation config and chat template."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    family, more, dtype = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **more, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():  # norms of ones, zero biases and tiny logits would hide errors
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    transformers.GenerationConfig(eos_token_id=[0, 7], temperature=0.6, do_sample=True).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w0", unk_token="w2"
    )
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)
