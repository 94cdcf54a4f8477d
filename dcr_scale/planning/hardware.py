"""What a cluster is taken to be able to do: data-sheet peaks, and the shares of them that runs reach, with a spread.

Peaks are the makers' (NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM: dense bf16, memory bandwidth,
NVLink in one direction); the network is one NDR400 (A100: HDR200) InfiniBand port a GPU, as in DGX systems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU and its share of a node. Rates in FLOP/s and bytes/s; ``memory`` in bytes."""

    name: str
    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float


DEVICES = {
    "a100": Device("A100 80GB SXM", 312e12, 80 * GIB, 2.04e12, 300e9, 25e9),
    "h100": Device("H100 SXM", 989e12, 80 * GIB, 3.35e12, 450e9, 50e9),
    "h200": Device("H200 SXM", 989e12, 140 * GIB, 4.8e12, 450e9, 50e9),
}

# GPUs of a node, which NVLink joins.
NODE = 8


@dataclass(frozen=True)
class Efficiency:
    """The shares of the peaks that count, in one of three views of a cluster.

    ``compute``: of the peak FLOP/s, in matrix products large enough for it. ``network``: of the links' rate, in
    collectives. ``hidden``: of the shorter of computing and sending that goes on behind the longer. ``latency``:
    seconds a collective takes however little it moves. ``launch``: seconds of the host's work a module and pass.
    ``disk``: bytes/s a node reads or writes.
    """

    compute: float
    network: float
    hidden: float
    latency: float
    launch: float
    disk: float


# Dense bf16 training reaches 33 to 39 % MFU under FSDP2 on H100 (torchtitan, December 2024), NCCL's all-gather 75 to
# 85 % of NVLink within a node; ZeRO-3 hides about half of its traffic. What is expected lies between, the spread
# covers good and bad clusters.
SLOW = Efficiency(compute=0.35, network=0.4, hidden=0.3, latency=80e-6, launch=150e-6, disk=0.5e9)
EXPECTED = Efficiency(compute=0.5, network=0.65, hidden=0.6, latency=40e-6, launch=80e-6, disk=2e9)
FAST = Efficiency(compute=0.65, network=0.85, hidden=0.9, latency=20e-6, launch=50e-6, disk=6e9)
VIEWS = (FAST, EXPECTED, SLOW)


def collective_rate(device: Device, gpus: int, efficiency: Efficiency) -> float:
    """Bytes/s that one rank receives in an all-gather (or sends in a reduce-scatter) over all GPUs.

    A ring goes at the rate of its slowest link. Between nodes all of a node's network ports work for one ring after
    another, so that the link is ``NODE`` ports wide.
    """
    slowest = device.link_rate if gpus <= NODE else min(device.link_rate, NODE * device.network_rate)
    return slowest * efficiency.network


def pass_seconds(
    device: Device,
    gpus: int,
    efficiency: Efficiency,
    *,
    flops: float,
    weight_bytes: float,
    sent: float,
    collectives: int,
    modules: int,
) -> float:
    """Seconds of a step's passes on one rank.

    Args:
        flops: of all passes, recomputation included.
        weight_bytes: of the weights that these passes read from the device's memory: with few tokens that, and not
            arithmetic, takes the time (Williams et al., "Roofline", 2009).
        sent: bytes the rank receives in collectives.
        collectives: how many.
        modules: how many modules ran, over all passes.
    """
    compute = max(flops / (device.flops * efficiency.compute), weight_bytes / device.memory_rate)
    compute = max(compute, modules * efficiency.launch)
    hops = math.log2(gpus) if gpus > 1 else 0.0
    talk = sent / collective_rate(device, gpus, efficiency) + collectives * hops * efficiency.latency
    longer, shorter = max(compute, talk), min(compute, talk)
    return longer + (1 - efficiency.hidden) * shorter


def update_seconds(device: Device, efficiency: Efficiency, held: float) -> float:
    """Seconds in which AdamW goes once through ``held`` bytes of masters, moments and gradients, and writes them."""
    return 2 * held / (device.memory_rate * efficiency.compute)
