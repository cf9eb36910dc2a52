"""Where the computing is done: the one place that asks whether there is a GPU.

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
# They look for Transformer Engine or bind patched names when they are imported.
_AFTER_ACTIVATION = ("transformer_engine", "megatron.core", "nemo", "modelopt.torch")


@dataclass(frozen=True)
class Backend:
    """What differs between a machine with CUDA and one without.

    Attributes:
        name: "cpu" or "gpu", as reports write it.
        device: PyTorch's name of the device: "cpu" or "cuda".
        accelerator: Lightning's name of it, for `nl.Trainer`: "cpu" or "gpu".
        process_group: backend of `torch.distributed`: "gloo" or "nccl".
        model_config: what every Megatron `TransformerConfig` must be given here.
    """

    name: str
    device: str
    accelerator: str
    process_group: str
    model_config: dict[str, Any] = field(default_factory=dict)

    def peak_memory_bytes(self) -> int:
        """Most memory so far, in bytes: allocated on this process's GPU, or resident in this process on a CPU."""
        if self.name == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        import torch  # this module is imported before PyTorch is needed

        return torch.cuda.max_memory_allocated()


@cache
def activate() -> Backend:
    """Decide for this process, once, make NeMo, Megatron-Core and Model Optimizer run on what there is, import them.

    With CUDA nothing is changed. Without, the stand-in for Transformer Engine goes to the front of `sys.path` and of
    PYTHONPATH (for child processes), and the patches of `prune_distill/nemo/cpu/patches.py` are applied.

    Raises:
        RuntimeError: if one of those libraries was imported already.
        ConfigError: if CUDA is available without Transformer Engine, or Transformer Engine installed without CUDA.
    """
    early = [name for name in _AFTER_ACTIVATION if name in sys.modules]
    if early:
        raise RuntimeError(f"{', '.join(early)} was imported before backend.activate(); activate first")
    from prune_distill.nemo import devices  # this module is imported before PyTorch is needed

    _lock_builds_by_flock()
    chosen = _activate_gpu() if devices.torch_device() == "cuda" else _activate_cpu()
    import_libraries("nemo.collections.llm")
    return chosen


def _lock_builds_by_flock() -> None:
    """Has torch lock its builds of extensions so that a killed process's lock is free.

    Its own lock is a file's existence (torch/utils/file_baton.py:35). After a kill every later process on the machine
    would wait forever while it imports Megatron, which builds one (megatron/core/inference/unified_memory.py:72).
    """
    from torch.utils import cpp_extension  # this module is imported before PyTorch is needed

    cpp_extension.FileBaton = FlockBaton


class FlockBaton:
    """`torch.utils.file_baton.FileBaton` by flock on the same file, which is not removed."""

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        self.file = open(lock_file_path, "a")  # noqa: SIM115

    def try_acquire(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Returns once the holder has released it."""
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
