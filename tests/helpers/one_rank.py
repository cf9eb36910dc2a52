"""Megatron on a single rank in this process, with tiny NeMo models and prepared data, for unit tests.

Import this module after `backend.activate()`.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo.collections import llm
from nemo.collections.llm.modelopt.model_utils import _set_gpt_mamba_modelopt_spec

from prune_distill.data.folder import DataFolder
from prune_distill.data.shards import SplitWriter
from prune_distill.nemo import nemo_api
from prune_distill.schema import Shape

VOCABULARY = 48
SHAPE = Shape(4, 64, 128, 4, 2, 16, VOCABULARY, 64, False)


@contextmanager
def one_rank() -> Iterator[None]:
    """Create Megatron's single-rank process groups over gloo, with one thread, because more would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    init_num_microbatches_calculator(0, None, 4, 2, 1)
    try:
        yield
    finally:
        destroy_num_microbatches_calculator()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)


def config(shape: Shape = SHAPE, **settings: Any) -> Any:
    """NeMo's config of a Qwen3 model of a shape, in fp32."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    sizes = {name: getattr(shape, name) for name in (*names, "vocab_size", "max_position_embeddings")}
    options = {
        **sizes,
        "make_vocab_size_divisible_by": 1,
        "share_embeddings_and_output_weights": shape.tie_word_embeddings,
        "seq_length": shape.max_position_embeddings,
        "init_method_std": 0.2,
        "params_dtype": torch.float32,
        "bf16": False,
        "pipeline_dtype": torch.float32,
    }
    made = llm.Qwen3Config(**{**options, **settings})
    nemo_api.configure(made)
    return made


# The attributes of a tokenizer that NeMo and Megatron's datasets use.
TOKENIZER = SimpleNamespace(vocab_size=VOCABULARY, eod=0, eos_id=0, pad_id=0, unique_identifiers={"class": "none"})


def core_model(shape: Shape = SHAPE, seed: int = 0, modelopt_spec: bool = False, **settings: Any) -> Any:
    """Megatron's model of a shape with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    made = config(shape, **settings)
    if modelopt_spec:
        _set_gpt_mamba_modelopt_spec(made)
    return made.configure_model(TOKENIZER).eval()


def nemo_model(shape: Shape = SHAPE, **settings: Any) -> Any:
    """NeMo's model around `core_model`'s config, not configured yet."""
    return llm.Qwen3Model(config(shape, **settings), tokenizer=TOKENIZER)


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def save_weights(core: Any, checkpoint: Path) -> Path:
    """The weights of a NeMo checkpoint."""
    weights = checkpoint / "weights"
    weights.mkdir(parents=True)
    # Megatron would use a queue in another process.
    with patch.object(filesystem_async, "_results_queue", queue.Queue()):
        dist_checkpointing.save(core.sharded_state_dict(prefix="module."), str(weights))
    return checkpoint


def write_data(
    folder: Path,
    train: dict[str, list[list[int]]],
    validation: list[list[int]],
    weights: dict[str, float] | None = None,
    text_bytes: int = 10,
) -> DataFolder:
    """Prepared documents: ids of each training document by source, and of each held-out one.

    Args:
        text_bytes: UTF-8 bytes of the text of each document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for source, documents in train.items():
        written = _write_split(folder / f"train-{source}", documents, text_bytes)
        weight = (weights or {}).get(source, 1.0)
        parts.append({"prefix": f"train-{source}", "source": source, "documents": len(documents), "weight": weight})
        parts[-1]["tokens"] = written
    tokens = _write_split(folder / "validation", validation, text_bytes)
    sources = {part["source"]: {"tokens": part["tokens"]} for part in parts}
    return DataFolder(folder, VOCABULARY, 0, parts, len(validation), tokens, text_bytes * len(validation), sources, {})


def _write_split(prefix: Path, documents: list[list[int]], text_bytes: int) -> int:
    writer = SplitWriter(prefix, np.dtype(np.uint16), VOCABULARY)
    for number, document in enumerate(documents):
        writer.add([np.array(document)], (number, 0, text_bytes))
    return writer.finish().tokens
