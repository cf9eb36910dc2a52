"""Measure energy in joules: of a GPU with NVML, of a processor with RAPL."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from prune_distill.nemo import devices

POWERCAP = Path("/sys/class/powercap")


@cache
def find_counter() -> Callable[[], float] | None:
    """Return a function that reads an energy counter in joules; None if the machine has none.

    A processor's counter covers all processes, and wraps around, so a difference may be negative.
    """
    if devices.torch_device() == "cuda":
        return _nvml()
    return rapl(POWERCAP)


def joules(before: float | None, after: float | None) -> float | None:
    """Return the energy between two readings in joules; None if it is unknown."""
    return None if before is None or after is None or after < before else after - before


def rapl(folder: Path) -> Callable[[], float] | None:
    """Return a reader of Linux's counters of the processor packages (Documentation/power/powercap); needs root."""
    files = sorted(folder.glob("intel-rapl:[0-9]*/energy_uj"))
    packages = [path for path in files if path.parent.name.count(":") == 1]
    try:
        for path in packages:
            int(path.read_text())
    except (OSError, ValueError):
        return None
    return (lambda: sum(int(path.read_text()) for path in packages) / 1e6) if packages else None


def _nvml() -> Callable[[], float] | None:
    try:
        import pynvml  # optional

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # GPUs before Volta do not count it
    except Exception:  # a missing package, library or permission each raises its own error
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
