"""python -m launch.torchrun --numa-binding=MODE ARGUMENTS...

Run torchrun with each rank bound to the cores near its GPU (see `torch/numa/binding.py` for the modes). Torch raises if
that is impossible, at worst after hours in a queue. So this module first checks the node that runs the stage, inside
the container: if ranks cannot be bound, it prints the reason and starts torchrun without binding.
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
    """Return the arguments of `python -m` that start torchrun."""
    if cluster.numa_binding is None:
        return ["torch.distributed.run"]
    return ["launch.torchrun", f"{OPTION}{cluster.numa_binding.value}"]


def explain_unneeded(root: Path = Path("/")) -> str | None:
    """Return the reason why binding has no effect on this machine; None if it has."""
    if not _gpus(root):
        return "no GPU is visible"
    if len(numa_nodes(root)) < 2:
        return "all available cores belong to one NUMA node"
    return None


def explain_impossible(root: Path = Path("/")) -> str | None:
    """Return the reason why ranks cannot be bound on this machine; None if they can."""
    nodes = numa_nodes(root)
    for gpu in _gpus(root):
        home = _home(gpu, root)
        if home is None:
            return f"the NUMA node of GPU {gpu} is unknown"
        # In this case torch raises "Must bind to a non-empty set of CPU indices".
        if home not in nodes:
            return f"GPU {gpu} is on NUMA node {home}, which has no available cores"
    # Torch 2.9 sets a rank's cores itself; later versions use numactl.
    if shutil.which("numactl") is None:
        return "numactl not found"
    core = min(nodes[min(nodes)])
    try:
        done = subprocess.run(
            ["numactl", f"--physcpubind={core}", "true"], capture_output=True, text=True, timeout=SECONDS_TO_ANSWER
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"numactl does not work on this machine ({error})"
    # The seccomp profile of a container may block it.
    reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return f"numactl does not work on this machine ({reason})" if done.returncode != 0 else None


def numa_nodes(root: Path = Path("/")) -> dict[int, set[int]]:
    """Return the cores that this process may use, by NUMA node; nodes without such cores are omitted."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    places = (root / "sys/devices/system/node").glob("node[0-9]*")
    nodes = {int(place.name.removeprefix("node")): _cores((place / "cpulist").read_text()) for place in places}
    return {node: cores & allowed for node, cores in sorted(nodes.items()) if cores & allowed}


def _cores(ranges: str) -> set[int]:
    """Parse a list of cores such as `0-3,8`."""
    found = re.findall(r"(\d+)(?:-(\d+))?", ranges)
    return {number for first, last in found for number in range(int(first), int(last or first) + 1)}


def _gpus(root: Path) -> list[str]:
    """Return the PCI addresses of the GPUs with a driver; none if the environment hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    return sorted(place.name for place in (root / "proc/driver/nvidia/gpus").glob("*"))


def _home(gpu: str, root: Path) -> int | None:
    """Return a GPU's NUMA node as torch does: -1 means node 0. None if the file that torch reads does not exist."""
    try:
        return max(0, int((root / f"sys/bus/pci/devices/{gpu}/numa_node").read_text()))
    except OSError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace this process by torchrun, which then receives its signals."""
    binding, *rest = sys.argv[1:] if arguments is None else arguments
    assert binding.startswith(OPTION), binding
    obstacle = explain_unneeded() or explain_impossible()
    if obstacle is not None:
        print(f"{binding.lstrip('-')} is ignored: {obstacle}", flush=True)
    options = [] if obstacle is not None else [binding]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, *rest])


if __name__ == "__main__":
    main()
