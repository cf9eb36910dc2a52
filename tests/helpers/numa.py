"""A machine of two NUMA nodes with a GPU each, as the kernel shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GPUS = {"0000:1b:00.0": 0, "0000:dc:00.0": 1}


def two_nodes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate cores 0-3 and 8 on node 0 and 4-7 on node 1; this process may use 2 to 5."""
    for node, cores in enumerate(("0-3,8", "4-7")):
        place = root / f"sys/devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cores}\n")
    for address, node in GPUS.items():
        (root / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        place = root / "sys/bus/pci/devices" / address
        place.mkdir(parents=True)
        (place / "numa_node").write_text(f"{node}\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 4, 5})
