"""python -m launch.torchrun --numa-binding=MODE ARGUMENTS...

torchrun, each of its ranks on the cores near its GPU (see `torch/numa/binding.py` for the modes). Torch raises where
that cannot be done, at worst after hours in a queue. So the node that runs the stage is looked at first, from inside
the container: where ranks cannot be bound, a line says why and torchrun starts without.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prune_distill.schema import ClusterConfig

SECONDS_TO_ANSWER = 10
OPTION = "--numa-binding="


def module(cluster: ClusterConfig) -> list[str]:
    """What `python -m` starts to have torchrun."""
    if cluster.numa_binding is None:
        return ["torch.distributed.run"]
    return ["launch.torchrun", f"{OPTION}{cluster.numa_binding.value}"]


def pointless(root: Path = Path("/")) -> str | None:
    """Why there is nothing to bind on this machine; None where there is."""
    if not _gpus(root):
        return "no GPU is visible"
    if len(numa_nodes(root)) < 2:
        return "all cores that may be used are of one NUMA node"
    return None


def prevented(root: Path = Path("/")) -> str | None:
    """Why ranks cannot be bound on a machine where it would help; None where they can."""
    nodes = numa_nodes(root)
    for gpu in _gpus(root):
        home = _home(gpu, root)
        if home is None:
            return f"the NUMA node of GPU {gpu} is not known"
        # Torch then raises "Must bind to a non-empty set of CPU indices".
        if home not in nodes:
            return f"GPU {gpu} is on NUMA node {home}, none of whose cores may be used here"
    # Torch 2.9 itself sets a rank's cores; later ones start ranks by numactl.
    if shutil.which("numactl") is None:
        return "numactl cannot be found"
    core = min(nodes[min(nodes)])
    try:
        done = subprocess.run(
            ["numactl", f"--physcpubind={core}", "true"], capture_output=True, text=True, timeout=SECONDS_TO_ANSWER
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"numactl does not work here ({error})"
    # A container's seccomp profile may forbid what it calls.
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return f"numactl does not work here ({said})" if done.returncode != 0 else None


def numa_nodes(root: Path = Path("/")) -> dict[int, set[int]]:
    """The cores that this process may use, by NUMA node; nodes without any are left out."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    places = (root / "sys/devices/system/node").glob("node[0-9]*")
    nodes = {int(place.name.removeprefix("node")): _cores((place / "cpulist").read_text()) for place in places}
    return {node: cores & allowed for node, cores in sorted(nodes.items()) if cores & allowed}


def _cores(ranges: str) -> set[int]:
    """The numbers of a list such as `0-3,8`."""
    found = re.findall(r"(\d+)(?:-(\d+))?", ranges)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


def _gpus(root: Path) -> list[str]:
    """PCI addresses of the GPUs for which there is a driver; none where the environment hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    return sorted(place.name for place in (root / "proc/driver/nvidia/gpus").glob("*"))


def _home(gpu: str, root: Path) -> int | None:
    """A GPU's NUMA node, read as torch does: -1 means node 0. None where torch would find no file."""
    try:
        return max(0, int((root / f"sys/bus/pci/devices/{gpu}/numa_node").read_text()))
    except OSError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Becomes torchrun: the process is the same, and so are its signals."""
    binding, *rest = sys.argv[1:] if arguments is None else arguments
    assert binding.startswith(OPTION), binding
    why_not = pointless() or prevented()
    if why_not is not None:
        print(f"{binding.lstrip('-')} is left out: {why_not}", flush=True)
    options = [] if why_not is not None else [binding]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, *rest])


if __name__ == "__main__":
    main()
