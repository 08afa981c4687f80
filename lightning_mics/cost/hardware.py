"""The machines of clusters, for predictions: capacity, peak, rates and latencies, each with its source.

Sources: memory and peaks are those of the vendors' data sheets; rates between nodes those of AWS's pages of the
instances; latencies between nodes those of the platform table of aws-ofi-nccl; rates to the host four fifths of what
PCI Express is specified for, not measured. For the others see each entry. Your own
machines are better described by your own ``nccl-tests``: :func:`lightning_mics.cost.nccl_tests.with_measured`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

IN_NODE_LATENCY_US = 3.4  # NVLink, per hop of a ring with protocol Simple: NCCL's src/graph/tuning.cc


@dataclass(frozen=True, kw_only=True)
class Links:
    """The links of one kind of node.

    Attributes:
        gpus_per_node: GPUs on each node, and so ranks.
        in_node_rate_gbytes_per_s: Bus bandwidth of rings inside a node, in GB/s.
        network_rate_gbits_per_s: Network rate of one node, in Gbit/s.
        network_achieved: Share of the network rate, 0 to 1, that collectives reach.
        network_latency_us: Latency per hop between nodes, in microseconds.
        in_node_latency_us: Latency per hop inside a node, in microseconds.
    """

    gpus_per_node: int
    in_node_rate_gbytes_per_s: float
    network_rate_gbits_per_s: float
    network_achieved: float
    network_latency_us: float
    in_node_latency_us: float = IN_NODE_LATENCY_US

    @property
    def network_bytes_per_s(self) -> float:
        """Bytes per second that collectives send from one node to others."""
        return self.network_rate_gbits_per_s * self.network_achieved * 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class Hardware(Links):
    """One kind of node, with its links.

    Attributes:
        gpu: Name of the GPU, for display.
        gpus_per_node: GPUs on each node, and so ranks.
        memory_gib: Memory of one GPU in GiB, the size in its vendor's name of it.
        peak_tflops: Peak of one GPU in TFLOP/s, dense, in the dtype of matrix products.
        kernel_share: Share of the peak, 0 to 1, that transformers reach without waiting for communication. It is fitted
            to published runs: benchmarks/results/published.
        in_node_rate_gbytes_per_s: Bus bandwidth of rings inside a node, in GB/s.
        network_rate_gbits_per_s: Network rate of one node, in Gbit/s.
        network_achieved: Share of the network rate, 0 to 1, that collectives reach.
        network_latency_us: Latency per hop between nodes, in microseconds.
        host_memory_gib: Memory of a node's host in GiB.
        host_rate_gbytes_per_s: Rate between a GPU and its host, in GB/s, in each direction at once.
        in_node_latency_us: Latency per hop inside a node, in microseconds.
    """

    gpu: str
    memory_gib: float
    peak_tflops: float
    kernel_share: float
    host_memory_gib: float
    host_rate_gbytes_per_s: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "gpu" and not value > 0:
                raise ValueError(f"{name}={value} of {self.gpu} must be positive")
        for name in ("kernel_share", "network_achieved"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)} of {self.gpu} is a share, so at most 1")

    @property
    def memory_bytes(self) -> int:
        """Memory of one GPU, in bytes."""
        return int(self.memory_gib * 2**30)


V100_SHARE, A100_SHARE, HOPPER_SHARE = 0.565, 0.64, 0.465  # fitted by benchmarks.published


_P4D = Hardware(
    gpu="A100 40 GB",
    gpus_per_node=8,
    memory_gib=40,
    peak_tflops=312,
    kernel_share=A100_SHARE,
    in_node_rate_gbytes_per_s=230,  # NVIDIA/nccl issue 527
    network_rate_gbits_per_s=400,
    network_achieved=0.85,  # nccl-tests in aws-samples/awsome-distributed-training
    network_latency_us=75,
    host_memory_gib=1152,
    host_rate_gbytes_per_s=12.5,  # PCIe 4.0 x16, which two GPUs share
)


_P5 = Hardware(
    gpu="H100 80 GB",
    gpus_per_node=8,
    memory_gib=80,
    peak_tflops=989,
    kernel_share=HOPPER_SHARE,
    in_node_rate_gbytes_per_s=440,  # nccl-tests in stas00/ml-engineering
    network_rate_gbits_per_s=3200,
    network_achieved=0.82,  # nccl-tests in aws-samples/awsome-distributed-training
    network_latency_us=72,
    host_memory_gib=2048,
    host_rate_gbytes_per_s=50,  # PCIe 5.0 x16
)


INSTANCES = {
    "p3dn.24xlarge": Hardware(
        gpu="V100 32 GB",
        gpus_per_node=8,
        memory_gib=32,
        peak_tflops=125,  # float16
        kernel_share=V100_SHARE,
        in_node_rate_gbytes_per_s=134,  # NVIDIA/nccl issue 235
        network_rate_gbits_per_s=100,
        network_achieved=0.6,  # MiCS, section 2.3
        network_latency_us=150,
        host_memory_gib=768,
        host_rate_gbytes_per_s=12,  # PCIe 3.0 x16
    ),
    "p4d.24xlarge": _P4D,
    "p4de.24xlarge": replace(_P4D, gpu="A100 80 GB", memory_gib=80),
    "p5.48xlarge": _P5,
    "p5en.48xlarge": replace(
        _P5,
        gpu="H200 141 GB",
        memory_gib=141,
        network_achieved=0.91,  # nccl-tests in aws-samples/awsome-distributed-training
        network_latency_us=35,
    ),
    "p6-b200.48xlarge": Hardware(
        gpu="B200 180 GB",
        gpus_per_node=8,
        memory_gib=180,
        peak_tflops=2250,
        kernel_share=HOPPER_SHARE,  # Hopper's: no published run of a B200 was found
        in_node_rate_gbytes_per_s=840,  # nccl-tests in aws-samples/awsome-distributed-training
        network_rate_gbits_per_s=3200,
        network_achieved=0.95,  # the same
        network_latency_us=35,
        host_memory_gib=2048,
        host_rate_gbytes_per_s=50,  # PCIe 5.0 x16
    ),
}


def find_instance(name: str) -> Hardware:
    """Find the hardware of an instance by its name, as in "p4d.24xlarge".

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if name in INSTANCES:
        return INSTANCES[name]
    near = difflib.get_close_matches(name, INSTANCES, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    known = ", ".join(INSTANCES)
    raise ValueError(
        f"instance {name!r} is not known{hint} Known are {known}; describe others by a Hardware of your own"
    )
