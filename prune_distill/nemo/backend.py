"""Select the CPU or GPU backend. Only this module and `devices` ask whether there is a GPU.

from prune_distill.nemo import backend
chosen = backend.activate()          # before nemo, megatron or modelopt is imported
trainer = nl.Trainer(accelerator=chosen.accelerator, ...)
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import resource
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from prune_distill.errors import ConfigError
from prune_distill.pipeline.processes import import_libraries

_LOG = logging.getLogger(__name__)
_SITE = Path(__file__).resolve().parent / "cpu" / "site"
# These look for Transformer Engine, or bind patched names, when they are imported.
_AFTER_ACTIVATION = ("transformer_engine", "megatron.core", "nemo", "modelopt.torch")


@dataclass(frozen=True)
class Backend:
    """Differences between a machine with CUDA and one without.

    Attributes:
        name: "cpu" or "gpu", for reports.
        device: PyTorch's name of the device: "cpu" or "cuda".
        accelerator: Lightning's name of it, for `nl.Trainer`: "cpu" or "gpu".
        process_group: backend of `torch.distributed`: "gloo" or "nccl".
        model_config: fields that every Megatron `TransformerConfig` needs on this backend.
    """

    name: str
    device: str
    accelerator: str
    process_group: str
    model_config: dict[str, Any] = field(default_factory=dict)

    def peak_memory_bytes(self) -> int:
        """Return the peak memory in bytes: allocated on this process's GPU, or resident in this process on a CPU."""
        if self.name == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        import torch  # this module is imported before PyTorch is needed

        return torch.cuda.max_memory_allocated()


@cache
def activate() -> Backend:
    """Select the backend of this process, prepare NeMo, Megatron-Core and Model Optimizer for it, and import NeMo.

    With CUDA nothing is changed. Without CUDA, the stand-in for Transformer Engine is put first in `sys.path` and
    PYTHONPATH (for child processes), and the patches in `prune_distill/nemo/cpu/patches.py` are applied.

    Raises:
        RuntimeError: one of these libraries has already been imported.
        ConfigError: CUDA is available without Transformer Engine, or Transformer Engine is installed without CUDA.
    """
    imported = [name for name in _AFTER_ACTIVATION if name in sys.modules]
    if imported:
        raise RuntimeError(f"{', '.join(imported)} was imported before backend.activate(); activate first")
    from prune_distill.nemo import devices  # this module is imported before PyTorch is needed

    _use_flock_for_builds()
    chosen = _activate_gpu() if devices.torch_device() == "cuda" else _activate_cpu()
    import_libraries("nemo.collections.llm")
    return chosen


def _use_flock_for_builds() -> None:
    """Make torch lock its extension builds with flock, so that a killed process releases its lock.

    Torch's own lock is the existence of a file (torch/utils/file_baton.py:35). After a kill, every later process would
    wait forever while it imports Megatron, which builds an extension (megatron/core/inference/unified_memory.py:72).
    """
    from torch.utils import cpp_extension  # this module is imported before PyTorch is needed

    cpp_extension.FileBaton = FlockBaton


class FlockBaton:
    """`torch.utils.file_baton.FileBaton` with flock on the same file, which is not removed."""

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        self.file = open(lock_file_path, "a")  # noqa: SIM115

    def try_acquire(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Wait until the holder releases the lock."""
        fcntl.flock(self.file, fcntl.LOCK_SH)
        self.release()

    def release(self) -> None:
        self.file.close()


def _activate_gpu() -> Backend:
    import torch  # this module is imported before PyTorch is needed

    name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or (spec.origin or "").startswith(str(_SITE)):
        raise ConfigError(
            f"CUDA is available ({name} x {count}) but Transformer Engine is not installed: run in the container of "
            "the Dockerfile, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    _LOG.info("backend: gpu (%s x %d)", name, count)
    return Backend(name="gpu", device="cuda", accelerator="gpu", process_group="nccl")


def _activate_cpu() -> Backend:
    from prune_distill.nemo.cpu import patches  # imports PyTorch

    _put_first_on_path(str(_SITE))
    try:
        import transformer_engine  # the stand-in, on the path since the line above
    except ImportError as error:
        raise ConfigError(str(error)) from error
    patches.apply(patches.PATCHES)
    _LOG.info("backend: cpu (no CUDA device found; Transformer Engine stand-in %s)", transformer_engine.__version__)
    return Backend(
        name="cpu",
        device="cpu",
        accelerator="cpu",
        process_group="gloo",
        model_config={"use_cpu_initialization": True, "gradient_accumulation_fusion": False},
    )


def _put_first_on_path(folder: str) -> None:
    sys.path.insert(0, folder)
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != folder]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *inherited])
