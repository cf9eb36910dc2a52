"""Where a run is executed: nodes, GPUs, and Slurm."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from prune_distill.schema.fields import site_specific


class GpuRequest(Enum):
    """How a job asks for GPUs: `--gpus-per-node=N`, `--gres=gpu:N`, or not at all, where a node comes with its own."""

    gpus_per_node = "gpus_per_node"
    gres = "gres"
    none = "none"


class NumaBinding(Enum):
    """Which cores a rank is bound to, as torchrun's --numa-binding names them: all of its GPU's NUMA node, all of the
    socket, a share of the node's that no other rank has, or those that share a cache."""

    node = "node"
    socket = "socket"
    exclusive = "exclusive"
    core_complex = "core-complex"


@dataclass
class Gpu:
    """One GPU, as `launch.plan` counts with it."""

    name: str = MISSING
    # GiB that PyTorch can use, as it names them in an out-of-memory error ("total capacity").
    memory_gib: float = MISSING
    # Peak TFLOP/s of bf16 products with fp32 sums, without sparsity.
    bf16_tflops: float = MISSING
    # Share of the peak that training reaches (MFU). The default is that of the one published run, Qwen3-8B to 6B by
    # depth: 90 B tokens x 50.3 GFLOP a token (student 33.9, teacher 16.3) = 4.52e21 FLOP in about 6,000 H100-hours,
    # and 4.52e21 / (6,000 x 3,600 s x 989.4e12) = 0.21.
    utilisation: float = 0.21


@dataclass
class SlurmConfig:
    """How stages become Slurm jobs. What has no default differs from site to site; null says that a site has none."""

    partition: str | None = site_specific("one that sinfo lists, or null for the site's default")
    account: str | None = site_specific("the account that pays, or null where the site has none")
    qos: str | None = None
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    # The type of GPU to ask for, as in --gpus-per-node=h100:8; null: any.
    gpu_type: str | None = None
    # CPU cores for each rank (--cpus-per-task, times the ranks on a node; data preparation asks for those of a whole
    # node); null: the site's default, which may be a single core for all ranks.
    cpus_per_gpu: int | None = None
    # Memory of each node as sbatch's --mem takes it: 200G, or 0 for all; null: the site's default.
    mem: str | None = None
    # Further lines for sbatch, such as --exclusive or --constraint=h100.
    sbatch: list[str] = field(default_factory=list)
    # Shell lines that go before the stage, such as `module load cuda`.
    setup: list[str] = field(default_factory=list)
    # Names of environment variables that jobs are given as they are where they are submitted, such as HF_TOKEN.
    secrets: list[str] = field(default_factory=list)
    # An image, or a squash file on a disk that all nodes see (pyxis); null: jobs use this very Python.
    container_image: str | None = site_specific(
        "an image built from the Dockerfile (registry#name:tag or a .sqsh file), or null"
    )
    # SOURCE:TARGET[:FLAGS], further to the run folder, which is always there.
    container_mounts: list[str] = field(default_factory=list)
    # Where the image has this repository.
    container_workdir: str = "/opt/nemo-prune-distill"
    # Whether jobs may be requeued; false: a training stage becomes a chain of jobs, each going on from the last, also
    # where that one was killed, as long as it left a newer checkpoint.
    requeue: bool = True
    # Seconds before its time limit at which a training stage is told to save and pause: one step, one save, and up to a
    # minute until a shared disk shows the stop file.
    warn_seconds: int = 600
    # How often a paused stage is started again.
    max_restarts: int = 20


@dataclass
class ClusterConfig:
    """Where the stages run."""

    name: str = MISSING
    nodes: int = 1
    # Ranks a node: GPUs, or processes on a machine without CUDA.
    devices_per_node: int = 1
    # CPU threads a rank; null: the node's cores shared out among its ranks.
    threads_per_rank: int | None = None
    # Which cores near its GPU a rank is bound to, where a machine has several NUMA nodes; null: any.
    numa_binding: NumaBinding | None = None
    # What launch.plan checks memory and estimates hours with; null: not stated, so neither is done.
    gpu: Gpu | None = None
    # The longest that a job may run, H:MM:SS or D-HH:MM:SS; null: no limit. YAML wants quotes around it.
    time_limit: str | None = None
    # Says that all nodes see the run's folder, where its file system looks like a disk of this machine only.
    run_dir_is_shared: bool = False
    # For several nodes without Slurm, on each of which the same command is started: HOST:PORT of the first one, a port
    # that is free there, and which of them this is, from 0.
    rdzv_endpoint: str | None = None
    node_rank: int = 0
    # Null: launch.run starts the stages itself.
    slurm: SlurmConfig | None = None
