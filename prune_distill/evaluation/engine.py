"""Measure held-out sequences with the engine that serves a quantized model: vLLM, in the serving environment."""

from __future__ import annotations

from pathlib import Path

import torch

from prune_distill.config.values import serve_python
from prune_distill.data.folder import DataFolder
from prune_distill.evaluation.heldout import Served, heldout_sequences
from prune_distill.nemo import hf_models
from prune_distill.schema import RunConfig
from prune_distill.serving import server
from prune_distill.serving.prompt_scores import score_sequences


def score_folder(folder: Path, data: DataFolder, cfg: RunConfig) -> tuple[Served, str]:
    """Serve a model for this rank's held-out sequences; return its results and the engine's name and version.

    Raises:
        InputError: there are too few held-out tokens, or vLLM cannot serve the model; its output says why.
    """
    length = cfg.evaluate.seq_length + 1
    options = ["--max-model-len", str(length), "--max-num-seqs", str(cfg.evaluate.micro_batch_size)]
    # The last token is generated, and never an input: it may lie beyond the model's positions.
    variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    space = hf_models.kv_cache_bytes(folder, length * cfg.evaluate.micro_batch_size)
    with server.serve(folder, serve_python(cfg.benchmark), options, space, variables) as url:
        served = score_served(url, server.MODEL, data, cfg)
        return served, f"vLLM {server.ask(f'{url}/version')['version']}"


def score_served(url: str, model: str, data: DataFolder, cfg: RunConfig) -> Served:
    """Let a server score this rank's held-out sequences. Raises: InputError; see `score_sequences`."""
    sequences = heldout_sequences(data, cfg.evaluate).tolist()
    log_probs, top = score_sequences(url, model, sequences, cfg.evaluate.micro_batch_size)
    return Served(torch.tensor(log_probs, dtype=torch.float64), torch.tensor(top))
