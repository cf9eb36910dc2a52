"""Joules that the machine has used so far, where it tells: a GPU through NVML, a processor through RAPL."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from prune_distill.nemo import devices

POWERCAP = Path("/sys/class/powercap")


@cache
def meter() -> Callable[[], float] | None:
    """What tells the joules so far, since some moment; None where the machine does not tell.

    A processor's are those of all its work; its counter goes round, so that a difference may come out negative.
    """
    if devices.torch_device() == "cuda":
        return _nvml()
    return rapl(POWERCAP)


def joules(before: float | None, after: float | None) -> float | None:
    """What was used between two readings; None where that is not known."""
    return None if before is None or after is None or after < before else after - before


def rapl(folder: Path) -> Callable[[], float] | None:
    """Linux counts the microjoules of each processor package (Documentation/power/powercap); root may read them."""
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
    except Exception:  # no package, no library, no right: each has errors of its own
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
