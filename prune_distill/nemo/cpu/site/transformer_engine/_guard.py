"""Prevent the use of the stand-in on machines where the real Transformer Engine could run."""

from __future__ import annotations

from importlib.metadata import Distribution
from pathlib import Path

import torch

_SITE = Path(__file__).resolve().parents[1]
# NVIDIA's wheels: the meta package, the libraries and the framework extension.
_REAL_NAMES = ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch")


def real_distributions() -> list[str]:
    """Installed Transformer Engine distributions other than the stand-in, as `name version (folder)`."""
    found = []
    for name in _REAL_NAMES:
        for distribution in Distribution.discover(name=name):
            folder = Path(str(distribution.locate_file(""))).resolve()
            if folder != _SITE:
                found.append(f"{name} {distribution.version} ({folder})")
    return found


def check_machine() -> None:
    """Raise ImportError if CUDA is available or a real Transformer Engine is installed."""
    if torch.cuda.is_available():
        raise ImportError(
            "the CPU stand-in for Transformer Engine was imported although CUDA is available "
            f"({torch.cuda.get_device_name()}); remove {_SITE} from PYTHONPATH"
        )
    real = real_distributions()
    if real:
        raise ImportError(
            "the CPU stand-in for Transformer Engine was imported although a real one is installed: "
            f"{', '.join(real)}; uninstall it, or run with a visible CUDA device"
        )
