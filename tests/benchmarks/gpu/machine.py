"""The GPU and the software of a benchmark, and the data sheet's figures of GPUs that `conf/cluster/gpu` knows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import yaml

from launch.environment import ROOT
from prune_distill.units import GIB

VERSIONS = (
    *("torch", "triton", "transformer_engine", "megatron-core", "nemo_toolkit", "nvidia-modelopt", "transformers"),
    *("flash-attn", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-nccl-cu13"),
)
# Words of the driver's name of a GPU, and the file of its figures; the first that matches.
_NAMES = (
    (("B200",), "b200"),
    (("H200",), "h200"),
    (("H100", "PCIE"), "h100_pcie"),
    (("H100", "HBM3"), "h100_sxm"),
    (("A100-SXM4-80GB",), "a100_80"),
    (("A100-SXM4-40GB",), "a100_40"),
    (("L40S",), "l40s"),
    (("RTX 4090",), "rtx_4090"),
)


def describe() -> dict[str, Any]:
    """Return the card, its memory and driver, and the versions of what it runs. Without a GPU, the CPU's."""
    import torch

    from prune_distill.nemo import devices

    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"card": devices.device_name(), "cores": os.cpu_count(), "versions": versions}
    if devices.torch_device() == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"memory_gib": round(total / GIB, 2), "free_gib": round(free / GIB, 2), "driver": _driver()}
        found["data_sheet"] = data_sheet(found["card"])
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def gpu_choice(card: str) -> str | None:
    """Return the name under which `cluster.gpu` knows a card; None: unknown, there is no peak to compare with."""
    for words, choice in _NAMES:
        if all(word in card.upper() for word in words):
            return choice
    return None


def data_sheet(card: str) -> dict[str, Any] | None:
    """Return the figures of a card in `conf/cluster/gpu`: bf16_tflops, memory_gbs and more; None: unknown."""
    choice = gpu_choice(card)
    if choice is None:
        return None
    content: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "cluster" / "gpu" / f"{choice}.yaml").read_text())
    return content
