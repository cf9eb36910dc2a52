"""Where a run is executed: nodes, GPUs, and Slurm."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from prune_distill.schema.fields import NonNegativeInt, PositiveFloat, PositiveInt, Range, ShareAboveZero, site_specific


class GpuRequest(Enum):
    """How a job requests GPUs: `--gpus-per-node=N`, `--gres=gpu:N`, or (`none`) not at all, where a node comes with
    its GPUs."""

    gpus_per_node = "gpus_per_node"
    gres = "gres"
    none = "none"


class NumaBinding(Enum):
    """The choices of torchrun's `--numa-binding`: all cores of the GPU's NUMA node (`node`), all cores of the socket
    (`socket`), a part of the node's cores that no other rank uses (`exclusive`), or the cores that share a cache
    (`core_complex`)."""

    node = "node"
    socket = "socket"
    exclusive = "exclusive"
    core_complex = "core-complex"


@dataclass
class Gpu:
    """The GPU that `launch.plan` computes memory and hours for."""

    # Name of the GPU in plans and messages.
    name: str = site_specific("its name, or choose a GPU with its figures, as in cluster.gpu=h200")
    # GiB that PyTorch can use: the "total capacity" in its out-of-memory errors.
    memory_gib: PositiveFloat = MISSING
    # Peak TFLOP/s of bf16 products with fp32 sums, without sparsity.
    bf16_tflops: PositiveFloat = MISSING
    # Peak TFLOP/s of FP8 products, without sparsity; null: the GPU has no FP8.
    fp8_tflops: PositiveFloat | None = None
    # CUDA compute capability, such as 9.0: FP8 needs 8.9, with block scales 9.0; null: not checked before the start.
    compute_capability: PositiveFloat | None = None
    # Bandwidth of the GPU's memory in GB/s; null: launch.plan estimates no hours unless mfu is set.
    memory_gbs: PositiveFloat | None = None
    # Bandwidth between the GPUs of a node in GB/s per GPU and direction (NVLink or PCIe); null: not known, for runs on
    # one GPU.
    link_gbs: PositiveFloat | None = None
    # Bandwidth to other nodes in GB/s per GPU and direction (50 for a 400 Gbit/s card per GPU); null: not known, for
    # runs on one node.
    network_gbs: PositiveFloat | None = None
    # Share of the peak that training reaches (MFU), if it was measured; null: launch.plan computes the time of each
    # layout from the figures above.
    mfu: ShareAboveZero | None = None
    # Price of one GPU for an hour, in any currency; null: plans show no costs.
    cost_per_hour: PositiveFloat | None = None


@dataclass
class SlurmConfig:
    """How stages become Slurm jobs. Keys without a default differ from site to site and must be set."""

    # Partition; null: the site's default.
    partition: str | None = site_specific("one that sinfo lists, or null for the site's default")
    # Account that is charged; null: the site has no accounts.
    account: str | None = site_specific("the account that pays, or null where the site has none")
    # Quality of service; null: the site's default.
    qos: str | None = None
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    # Type of GPU to request, as in `--gpus-per-node=h100:8`; null: any type.
    gpu_type: str | None = None
    # CPU cores per rank. A job requests as many for each of its ranks, and data preparation those of a whole node;
    # null: the site's default, which may be a single core for all ranks.
    cpus_per_gpu: PositiveInt | None = None
    # Memory per node in the form of sbatch's `--mem`, such as 200G; 0: all of the node's memory; null: the site's
    # default.
    mem: str | None = None
    # Further options for sbatch, such as --exclusive or --constraint=h100.
    sbatch: list[str] = field(default_factory=list)
    # Shell lines that run before the stage, such as `module load cuda`.
    setup: list[str] = field(default_factory=list)
    # Names of environment variables, such as HF_TOKEN, that jobs receive from the environment of launch.run.
    secrets: list[str] = field(default_factory=list)
    # Container image for pyxis: registry#name:tag, or a .sqsh file on a disk that all nodes see; null: no container,
    # jobs use the Python that runs launch.run.
    container_image: str | None = site_specific(
        "an image built from the Dockerfile (registry#name:tag or a .sqsh file), or null"
    )
    # Mounts as SOURCE:TARGET[:FLAGS], in addition to the run folder, which is always mounted.
    container_mounts: list[str] = field(default_factory=list)
    # Folder of this repository inside the image.
    container_workdir: str = "/opt/nemo-prune-distill"
    # Whether jobs may be requeued. If false, a training stage becomes a chain of jobs, each of which continues from the
    # last checkpoint, also after a job that was killed, provided that it saved a newer checkpoint.
    requeue: bool = True
    # Seconds before the time limit at which a training stage is asked to save and pause. They must cover one step, one
    # save, and up to a minute until a shared disk shows the stop file.
    warn_seconds: PositiveInt = 600
    # Largest number of times that a paused stage is started again.
    max_restarts: NonNegativeInt = 20


@dataclass
class ClusterConfig:
    """Where the stages run."""

    # Name of the cluster in plans and messages.
    name: str = MISSING
    # Number of nodes.
    nodes: Annotated[PositiveInt, Range(at_most=2**20)] = 1
    # Ranks per node: GPUs, or processes on a machine without CUDA.
    devices_per_node: Annotated[PositiveInt, Range(at_most=1024)] = 1
    # CPU threads per rank; null: the node's cores divided by its ranks.
    threads_per_rank: PositiveInt | None = None
    # Cores near its GPU that a rank is bound to, on machines with several NUMA nodes; null: no binding.
    numa_binding: NumaBinding | None = None
    # The GPU of the nodes; null: launch.plan checks no memory and estimates no hours.
    gpu: Gpu | None = None
    # Longest time that a job may run, as H:MM:SS or D-HH:MM:SS, in quotes in YAML; null: no limit.
    time_limit: str | None = None
    # Declares that all nodes see the run folder, where its file system looks like a local disk.
    run_dir_is_shared: bool = False
    # HOST:PORT of the first node, with a free port, for several nodes without Slurm; the same command is started on
    # each of them. Null: one node, or Slurm.
    rdzv_endpoint: str | None = None
    # Number of this node, from 0, for several nodes without Slurm.
    node_rank: NonNegativeInt = 0
    # Settings of Slurm; null: launch.run starts the stages itself.
    slurm: SlurmConfig | None = None
