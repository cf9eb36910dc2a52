"""The device of this process, for code that needs PyTorch alone. Patches nothing."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def torch_device() -> str:
    """Return "cuda" where CUDA is available, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Return the name of the GPU or the processor."""
    if torch_device() == "cuda":
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.machine())


def free_memory_bytes() -> int:
    """Return how many bytes tensors can still take on this process's device."""
    if torch_device() == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *_free_in_container()])


def _free_in_container() -> list[int]:
    """Return the bytes free within a container's limit (cgroup v2); an empty list without a limit."""
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # "max": no limit
        return []
    # The kernel drops cached files when it needs memory.
    stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
    cached = int(stat[stat.index("file") + 1]) if "file" in stat else 0
    return [limit - used + cached]


def measure_peak_memory(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of `work`, and the peak memory in bytes of the tensors that it allocated."""
    if torch_device() == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, int(torch.cuda.max_memory_allocated() - before)
    # The resident memory of a process tells little here: the process keeps freed blocks.
    with torch.autograd.profiler.profile(profile_memory=True, use_cpu=True, use_kineto=True) as profile:
        result = work()
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return result, max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def synchronize() -> None:
    """Wait until the device has completed all work."""
    if torch_device() == "cuda":
        torch.cuda.synchronize()
