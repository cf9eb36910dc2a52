"""The stand-in must never be taken where the real Transformer Engine could run."""

from __future__ import annotations

from importlib.metadata import Distribution
from pathlib import Path

import torch

_SITE = Path(__file__).resolve().parents[1]
# How NVIDIA names its wheels: the meta package, and the library and the framework extension below it.
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


def refuse_beside_the_real_one() -> None:
    """Raise ImportError where CUDA is available or a real Transformer Engine is installed."""
    if torch.cuda.is_available():
        raise ImportError(
            "the CPU stand-in for Transformer Engine was imported where CUDA is available "
            f"({torch.cuda.get_device_name()}); take {_SITE} off PYTHONPATH"
        )
    real = real_distributions()
    if real:
        raise ImportError(
            "the CPU stand-in for Transformer Engine was imported beside a real one: "
            f"{', '.join(real)}; uninstall that one, or run where a CUDA device is visible"
        )
