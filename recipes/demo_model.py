"""torchrun -m recipes demo_model --config RUN_DIR/resolved.yaml

Train a small teacher for the demo, without downloads: text from the standard library's
documentation, a byte-level BPE tokenizer, and a dense or MoE model in Qwen3's architecture, trained by NeMo with the
same code as all other trainings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.model.qwen3 import Qwen3MoEConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

from convert.exporting import export_model
from prune_distill.atomic_files import write_text
from prune_distill.data import demo_corpus
from prune_distill.data.prepare import prepare
from prune_distill.model.model_size import EXPERT_SIZES
from prune_distill.nemo import nemo_api
from prune_distill.pipeline.names import CORPUS_TRAIN, CORPUS_VALIDATION, HF, NEMO
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.schema import DataConfig, RunConfig, Shape
from prune_distill.training.training import train

# Between 0.02 (usual) and 1 / sqrt(hidden_size): 0.05 nats lower after 640 steps, stable at twice the learning rate.
INIT_STD = 0.05
END_OF_TEXT = "<|endoftext|>"
# The model continues text, so a chat is the text of its messages. Chat endpoints require a template.
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join('\n\n') }}"


@dataclass(frozen=True)
class Inputs:
    """No inputs."""


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `corpus/{train,validation}.jsonl` and `hf/`, the teacher as a Hugging Face folder."""
    assert cfg.model.demo is not None  # otherwise the stage is not part of the run
    assert cfg.model.shape is not None  # checked by prune_distill.config.validate
    texts, validation_texts = demo_corpus.documents()
    train_file = _write_jsonl(out / CORPUS_TRAIN, texts)
    validation_file = _write_jsonl(out / CORPUS_VALIDATION, validation_texts)
    reference = out / "reference"
    _write_tokenizer(texts, cfg.model.shape.vocab_size, reference)
    _write_config(cfg.model.shape, reference)
    files = {"train": [str(train_file)], "validation": [str(validation_file)]}
    # The data section is not part of this stage's identity, so only its placement settings are used.
    data = prepare(DataConfig(num_workers=cfg.data.num_workers), files, reference, out / "tokens", cfg.seed)

    kind = Qwen3MoEConfig if cfg.model.shape.num_moe_experts else llm.Qwen3Config
    config = kind(**_nemo_config(cfg.model.shape, cfg.model.demo.training.seq_length))
    nemo_api.configure(config)
    model = llm.Qwen3Model(config, tokenizer=AutoTokenizer(str(reference)))
    metrics = train(model, cfg.model.demo.training, data, out, seed=cfg.seed, start=None, key="model.demo.training")
    title = "The demo's teacher"
    export_model(out / NEMO, reference, out / HF, "keep", title=title, base="random weights")
    return {"bigram_loss": bigram_loss(data), **metrics}


def _write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _write_tokenizer(texts: Sequence[str], vocab_size: int, folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _write_config(shape: Shape, folder: Path) -> None:
    kind, expert_sizes = (Qwen3MoeConfig, _hf_experts(shape)) if shape.num_moe_experts else (Qwen3Config, {})
    config = kind(
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_word_embeddings,
        initializer_range=INIT_STD,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        torch_dtype="float32",
        **expert_sizes,
    )
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=0, pad_token_id=0).save_pretrained(folder)


def _hf_experts(shape: Shape) -> dict[str, Any]:
    return {
        "num_experts": shape.num_moe_experts,
        "num_experts_per_tok": shape.moe_router_topk,
        "moe_intermediate_size": shape.moe_ffn_hidden_size,
        "norm_topk_prob": True,
    }


def _nemo_config(shape: Shape, seq_length: int) -> dict[str, Any]:
    """Return arguments of NeMo's `Qwen3Config`; others have the same defaults in NeMo and transformers."""
    experts = {name: size for name in EXPERT_SIZES if (size := getattr(shape, name)) is not None}
    if experts:
        experts["moe_permute_fusion"] = False  # requires Transformer Engine 2.1 (see convert/families.py)
    return {
        **experts,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "vocab_size": shape.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "max_position_embeddings": shape.max_position_embeddings,
        "share_embeddings_and_output_weights": shape.tie_word_embeddings,
        "seq_length": seq_length,
        "rotary_base": 10000.0,
        "layernorm_epsilon": 1e-6,
        "init_method_std": INIT_STD,
    }


def bigram_loss(data: Any) -> float:
    """Return the validation loss of a smoothed bigram model, nats per token, which the teacher must beat.

    Each row of counts gets `strength` pseudo-counts of the unigram distribution (Dirichlet prior).
    """
    train, validation = data.tokens("train"), data.tokens("validation")
    vocab_size, strength = data.vocab_size, 10.0
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((vocab_size, vocab_size))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    previous, following = validation[:-1], validation[1:]
    total = pairs[previous].sum(1)
    return float(-np.log((pairs[previous, following] + strength * unigram[following]) / (total + strength)).mean())
