"""The checks of `launch.doctor`: each is a function that yields findings and changes nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from launch import partition, torchrun
from launch.environment import ROOT
from launch.slurm import COMMANDS
from prune_distill.config.input_files import HUB_FOLDERS
from prune_distill.pipeline.identity import installed_version
from prune_distill.schema import RunConfig
from prune_distill.units import GIB

# Minimum in NVIDIA's container documentation for ranks that communicate through shared memory.
LEAST_SHARED_MEMORY = GIB
LEAST_OPEN_FILES = 4096
SECONDS_TO_ANSWER = 120


class State(Enum):
    """State of a finding: `fail` stops a run, `warn` slows it down or may stop it later."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True)
class Finding:
    """The result of a check: its name, what was found, and how to fix it."""

    name: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Range:
    """Supported versions of a library: at least `least`, below `below`; `reason`: what breaks otherwise."""

    least: str
    below: str
    reason: str


RANGES = {
    "nemo_toolkit": Range("2.6", "3", "3.0 has no LLM collection"),
    "megatron-core": Range("0.15", "0.16", "NeMo 2.x imports what 0.16 dropped (dist_checkpointing's tensorstore)"),
    "nvidia-modelopt": Range(
        "0.40", "0.41", "0.37 prunes no experts, 0.41 no query groups, 0.42 and 0.43 fail to load checkpoints"
    ),
    "numpy": Range("1.26", "2", "megatron-core 0.15 needs numpy below 2"),
}
OTHERS = ("torch", "transformers", "hydra-core", "omegaconf")


def libraries() -> Iterator[Finding]:
    """Compare installed versions with the lock file and with the supported ranges."""
    installed = {name: installed_version(name) for name in (*RANGES, *OTHERS)}
    absent = [name for name, version in installed.items() if version is None]
    if "torch" in absent and "nemo_toolkit" in absent:
        fix = "run make setup; not needed on a login node whose jobs run in a container"
        yield Finding("libraries", State.warn, "PyTorch and NeMo are not installed", fix)
        return
    locked = _locked()
    for name, version in installed.items():
        known, tested = RANGES.get(name), locked[_normal(name)]
        if version is None:
            yield Finding(name, State.fail, "not installed", "run make setup, or use the container of the Dockerfile")
        elif known is not None and not _parts(known.least) <= _parts(version) < _parts(known.below):
            fix = f"install {tested} ({known.reason})"
            yield Finding(name, State.fail, f"{version} is not supported", fix)
        elif version.split("+")[0] != tested:
            fix = f"install {tested}; not needed in the container, which has its own versions"
            yield Finding(name, State.warn, f"{version}; tested with {tested}", fix)
        else:
            yield Finding(name, State.ok, version)


def _locked() -> dict[str, str]:
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): version for name, version in pins}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


# Run in a separate process, because the doctor also runs without torch.
_PROBE = """
import json, torch
from importlib import metadata
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
devices = [torch.cuda.get_device_properties(index) for index in range(count)]
installed = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in metadata.distributions()}
print(json.dumps({
    "built_for_cuda": torch.version.cuda,
    "devices": [[device.name, device.total_memory, device.major] for device in devices],
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if count and torch.distributed.is_nccl_available() else None,
    # Without the CPU stand-in, which is on the path of processes that a stage starts.
    "transformer_engine": any(
        name.startswith("transformer-engine") and not version.endswith("standin") for name, version in installed.items()
    ),
}))
"""


def accelerator(cfg: RunConfig | None) -> Iterator[Finding]:
    """Check the GPUs, NCCL and Transformer Engine that PyTorch finds."""
    if installed_version("torch") is None:
        return
    output = _run([sys.executable, "-c", _PROBE])
    try:
        seen = json.loads((output or "").splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        yield Finding("PyTorch", State.fail, "cannot be imported", f"{sys.executable} -c 'import torch' shows why")
        return
    devices, has_engine = seen["devices"], seen["transformer_engine"]
    if not devices:
        yield from _no_gpu(cfg, seen["built_for_cuda"], has_engine)
        return
    names = ", ".join(f"{name} {memory / GIB:.0f} GiB" for name, memory, _ in devices)
    yield Finding("GPUs", State.ok, f"{len(devices)}: {names}")
    if cfg is not None and cfg.cluster.devices_per_node > len(devices):
        found = f"{len(devices)} GPUs, but cluster.devices_per_node={cfg.cluster.devices_per_node}"
        yield Finding("GPUs", State.fail, found, f"set cluster.devices_per_node={len(devices)}")
    if any(major < 8 for *_, major in devices):
        yield Finding(
            "bf16", State.fail, "not supported by GPUs before Ampere", "use GPUs of compute capability 8 or newer"
        )
    if not has_engine:
        fix = "use the container of the Dockerfile, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        yield Finding("Transformer Engine", State.fail, "not installed, although there are GPUs", fix)
    if len(devices) > 1:
        if seen["nccl"]:
            yield Finding("NCCL", State.ok, seen["nccl"])
        else:
            yield Finding("NCCL", State.fail, "PyTorch was built without it", "use the container of the Dockerfile")
        yield from links()


def _no_gpu(cfg: RunConfig | None, built_for_cuda: str | None, has_engine: bool) -> Iterator[Finding]:
    if _run(["nvidia-smi", "-L"]):
        cause = "a driver that is too old" if built_for_cuda else "a CPU build of PyTorch"
        fix = f"check for {cause}, CUDA_VISIBLE_DEVICES and, in a container, --gpus all"
        yield Finding("GPUs", State.fail, "found by nvidia-smi, but not by PyTorch", fix)
    elif cfg is not None and cfg.cluster.gpu is not None and cfg.cluster.slurm is None:
        found = f"none, but cluster={cfg.cluster.name} has {cfg.cluster.gpu.name}"
        yield Finding("GPUs", State.warn, found, "start the run on a GPU node, or set cluster=local to use the CPU")
    else:
        yield Finding("GPUs", State.ok, "none: stages run on the CPU")
    if has_engine:
        fix = "uninstall it, or run with a visible GPU"
        yield Finding("Transformer Engine", State.fail, "installed, although there is no GPU", fix)


def links() -> Iterator[Finding]:
    """Check for NVLink between the GPUs, with `nvidia-smi topo -m`."""
    table = _run(["nvidia-smi", "topo", "-m"])
    if table is None:
        return
    if re.search(r"\bNV\d+\b", table):
        yield Finding("GPU links", State.ok, "NVLink")
    else:
        fix = "prefer data and pipeline parallelism: lower distill.parallel.tensor_model_parallel_size"
        yield Finding("GPU links", State.warn, "no NVLink: tensor parallelism is slow", fix)


def numa(cfg: RunConfig | None, root: Path = Path("/")) -> Iterator[Finding]:
    """Check that ranks are bound to the NUMA node of their GPU, on machines with several."""
    count = len(torchrun.numa_nodes(root))
    unneeded = torchrun.explain_unneeded(root)
    binding = cfg.cluster.numa_binding if cfg is not None else None
    if unneeded is not None:
        yield Finding("NUMA", State.ok, f"{count} node{'s' * (count != 1)}; nothing to bind: {unneeded}")
    elif cfg is not None and binding is None:
        fix = "set cluster.numa_binding=node"
        yield Finding("NUMA", State.warn, f"{count} nodes, but ranks are not bound to one", fix)
    elif (obstacle := torchrun.explain_impossible(root)) is not None:
        fix = (
            "install numactl; add --cap-add=SYS_NICE to docker run, as launch.docker does; request all cores of a node"
        )
        yield Finding("NUMA", State.warn, f"{count} nodes, but ranks cannot be bound: {obstacle}", fix)
    else:
        state = "can be bound" if binding is None else f"are bound (cluster.numa_binding={binding.value})"
        yield Finding("NUMA", State.ok, f"{count} nodes; ranks {state}")


def limits(infiniband: Path = Path("/sys/class/infiniband")) -> Iterator[Finding]:
    """Check the resource limits of the shell."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < LEAST_OPEN_FILES
    fix = "run ulimit -n 65536 before the launch (data loaders and checkpoints open many files)" if few else ""
    yield Finding("open files", State.warn if few else State.ok, str(files), fix)
    memory, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if memory != resource.RLIM_INFINITY and infiniband.is_dir() and any(infiniband.iterdir()):
        fix = "run ulimit -l unlimited, or docker run --ulimit memlock=-1: NCCL registers memory with the network card"
        yield Finding("locked memory", State.warn, f"{memory / GIB:.3f} GiB, with InfiniBand", fix)


def shared_memory(cfg: RunConfig | None, place: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check the free space in /dev/shm, which NCCL and data loaders use for communication."""
    if not place.is_dir():
        return
    free = shutil.disk_usage(place).free
    ranks = cfg.cluster.devices_per_node if cfg is not None else 1
    if free >= LEAST_SHARED_MEMORY:
        yield Finding("shared memory", State.ok, f"{free / GIB:.1f} GiB free")
    else:
        fix = "add --ipc=host or --shm-size=16g to docker run, as launch.docker does"
        yield Finding("shared memory", State.fail if ranks > 1 else State.warn, f"{free / GIB:.2f} GiB free", fix)


def hub() -> Iterator[Finding]:
    """Check the Hugging Face cache, and whether there is a token. The token itself is not shown."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    name = next((name for name in HUB_FOLDERS[1:3] if os.environ.get(name)), "HF_HOME")
    shown = os.environ.get(name, "~/.cache/huggingface")
    cache = Path(shown).expanduser()
    place = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(place, os.W_OK):
        yield Finding("Hub cache", State.warn, f"{shown} is not writable", f"set {name} to a writable folder")
    else:
        yield Finding("Hub cache", State.ok, f"{shown}, {shutil.disk_usage(place).free / GIB:.0f} GiB free")
    if "HF_TOKEN" in os.environ or (home / "token").exists():
        yield Finding("Hub token", State.ok, "found")
    else:
        yield Finding("Hub token", State.ok, "none: public models and local folders only")


def slurm(cfg: RunConfig | None) -> Iterator[Finding]:
    """Check Slurm's commands, its controller and pyxis, which runs with `cluster=slurm` need."""
    section = cfg.cluster.slurm if cfg is not None else None
    if cfg is not None and section is None:
        return
    severity = State.warn if section is None else State.fail
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent and section is None:
        yield Finding("Slurm", State.ok, "not installed")
    elif absent:
        fix = "submit from a login node, or set cluster=one_node"
        yield Finding("Slurm", State.fail, f"{', '.join(absent)} not found", fix)
    elif " UP" not in (answer := " ".join((_run(["scontrol", "ping"]) or "").split())):
        yield Finding("Slurm", severity, "the controller does not answer", "scontrol ping shows why")
    else:
        yield Finding("Slurm", State.ok, answer)
        yield from (Finding("partition", State.fail, fault) for fault in (partition.faults(cfg) if cfg else []))
        yield from _pyxis(needed=section is not None and section.container_image is not None)


def _pyxis(needed: bool) -> Iterator[Finding]:
    if "--container-image" in (_run(["srun", "--help"]) or ""):
        yield Finding("pyxis", State.ok, "srun supports --container-image")
    else:
        fix = "set cluster.slurm.container_image=null to run without a container"
        yield Finding("pyxis", State.fail if needed else State.warn, "srun does not support --container-image", fix)


def _run(command: list[str]) -> str | None:
    """Return the output of a command; None if it is not installed, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
