"""The speed of GPUs and of what joins them: the seconds of a product, of memory traffic and of a collective."""

from __future__ import annotations

from dataclasses import dataclass

from prune_distill.schema import ClusterConfig

# The shares of a GPU's bf16 and FP8 peak that large products reach: each fitted to a published run (docs/planning.md).
PRODUCT_SHARE = 0.61
FP8_PRODUCT_SHARE = 0.59
# Assumption: start, tail and epilogue of a product, which do not shrink with its size. Half a wave of 128 x 256 tiles
# over an H100's 132 multiprocessors takes 13 us for an inner size of 2,048.
PRODUCT_SECONDS = 10e-6
# Assumption: what elementwise kernels reach of the memory's bandwidth.
MEMORY_SHARE = 0.8
# Assumption: from the launch of a small kernel to that of the next.
KERNEL_SECONDS = 4e-6
# Assumption: what large collectives reach of a link's bandwidth in one direction, 324 GB/s of an H100's 450; the same
# of a network card's.
LINK_SHARE = 0.72
NETWORK_SHARE = 0.8
# Assumption: a collective of a few bytes.
COLLECTIVE_SECONDS = 20e-6
BF16_BYTES = 2
FP32_BYTES = 4


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run. Bandwidths in bytes a second, each way.

    Attributes:
        devices: GPUs of a node.
        network: None where there is one node.
    """

    flops: float
    fp8_flops: float | None
    memory: float
    link: float
    network: float | None
    devices: int

    def product(
        self, rows: float, inner: float, columns: float, output_bytes: int = BF16_BYTES, fp8: bool = False
    ) -> float:
        """Seconds of a product `[rows, inner] x [inner, columns]`."""
        share, peak = (FP8_PRODUCT_SHARE, self.fp8_flops) if fp8 and self.fp8_flops else (PRODUCT_SHARE, self.flops)
        traffic = BF16_BYTES * inner * (rows + columns) + output_bytes * rows * columns
        return max(2 * rows * inner * columns / (share * peak), self.copy(traffic)) + PRODUCT_SECONDS

    def copy(self, size: float) -> float:
        """Seconds to read or write so many bytes of the GPU's memory."""
        return size / (MEMORY_SHARE * self.memory)

    def elementwise(self, size: float, kernels: int) -> float:
        return self.copy(size) + kernels * KERNEL_SECONDS

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes a second that a ring over `ranks` ranks, `stride` apart, moves on each.

        Ranks of a group that share a node use that many of the node's network cards.
        """
        in_node = min(ranks, max(1, self.devices // stride))
        link = LINK_SHARE * self.link
        if in_node == ranks or self.network is None:
            return link
        return min(link, NETWORK_SHARE * self.network * in_node)

    def gather(self, size: float, ranks: int, stride: int) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes in all; an all-reduce takes two."""
        if ranks == 1:
            return 0.0
        return size * (ranks - 1) / ranks / self.bandwidth(ranks, stride) + COLLECTIVE_SECONDS

    def exchange(self, size: float, ranks: int) -> float:
        """Seconds of an all-to-all between neighboring ranks, each of which has `size` bytes for all of them."""
        if ranks == 1:
            return 0.0
        in_node = min(ranks, self.devices)
        near = size * (in_node - 1) / ranks / (LINK_SHARE * self.link)
        far = size * (ranks - in_node) / ranks / (NETWORK_SHARE * (self.network or self.link))
        return near + far + COLLECTIVE_SECONDS


def describe_machine(cluster: ClusterConfig) -> Machine | None:
    """A cluster's figures; None where one that the model needs is not stated."""
    gpu, ranks = cluster.gpu, cluster.nodes * cluster.devices_per_node
    if gpu is None or gpu.memory_gbs is None:
        return None
    if (ranks > 1 and gpu.link_gbs is None) or (cluster.nodes > 1 and gpu.network_gbs is None):
        return None
    return Machine(
        flops=gpu.bf16_tflops * 1e12,
        fp8_flops=gpu.fp8_tflops * 1e12 if gpu.fp8_tflops else None,
        memory=gpu.memory_gbs * 1e9,
        link=(gpu.link_gbs or gpu.memory_gbs) * 1e9,
        network=gpu.network_gbs * 1e9 if gpu.network_gbs and cluster.nodes > 1 else None,
        devices=cluster.devices_per_node,
    )
