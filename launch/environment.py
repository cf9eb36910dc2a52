"""The environment variables of all stages, on any launcher. Variables that the user sets take precedence."""

from __future__ import annotations

import math
from pathlib import Path

from prune_distill.pipeline.artifact import Located

ROOT = Path(__file__).resolve().parents[1]


def environment(located: Located) -> dict[str, str]:
    """Return the environment variables of a stage, except for thread counts, which the launcher sets."""
    env = {
        "PYTHONUNBUFFERED": "1",
        # Otherwise tokenizers stops using threads once the data loader has forked its workers, with a
        # warning.
        "TOKENIZERS_PARALLELISM": "true",
    }
    if located.stage.trains and located.stage.ranks(located.cfg) > 1:
        env |= _megatron(located)
    return env


def _megatron(located: Located) -> dict[str, str]:
    """Return NeMo's settings for speed (nemo/lightning/run/plugins.py:390-414). They have no effect on a CPU."""
    distill = located.cfg.distill
    correction = distill.teacher_correction if located.stage.name == "correct_teacher" else None
    parallel = (correction or distill).parallel
    env = {
        # Reserve multiprocessors for the collectives that overlap with a layer norm.
        "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",
        "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
        "TORCH_NCCL_HIGH_PRIORITY": "1",
    }
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        # Kernels run in the order in which they are launched, so that collectives overlap with matmuls
        # (megatron/core/tensor_parallel/layers.py:649; without it :720 warns). NeMo requires 32 on Blackwell.
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return env


def nodes_and_ranks(located: Located) -> tuple[int, int]:
    """Return a stage's number of nodes, and its ranks per node."""
    ranks, devices = located.stage.ranks(located.cfg), located.cfg.cluster.devices_per_node
    return math.ceil(ranks / devices), min(ranks, devices)


def stage_arguments(located: Located, resolved: Path) -> list[str]:
    """Return the arguments after `python -m` or `torchrun ... -m` for a stage."""
    return [located.stage.runner, located.stage.name, "--config", str(resolved)]
