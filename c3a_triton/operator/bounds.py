"""The least that a launch takes: what it moves and computes, over what the card can do at most.

A launch takes no less than its bytes over the bandwidth of the memory, than what crosses the L2 over the L2's, than its
warp instructions over the issue slots, than its FLOPs over the rate of its matrix products. The constants are of card
families; nothing of it was measured with this library.
"""

from collections.abc import Iterable, Mapping
from math import inf
from typing import NamedTuple

__all__ = ["CARDS", "CEILINGS", "WRITTEN", "Ceilings", "Launch", "ceilings_of", "seconds", "streamed"]


class Ceilings(NamedTuple):
    """What a card can do, as the cost model sees it: bytes, FLOPs and warp instructions per second, seconds."""

    bandwidth: float
    l2_bandwidth: float  # of reads
    l2_bytes: float  # what is found again of the bytes that the launch before wrote last
    cublas_flops: Mapping[int, float]  # by bytes per element
    triton_flops: Mapping[int, float]  # the same, of a plain GEMM in Triton
    tf32_flops: float
    instructions: float
    launch_seconds: float
    overlap_seconds: float  # by which a launch that may begin within the one before is cheaper
    fused_reals: int  # of a slot's matrix at most, for one kernel to compute dx's product and dw's (tiles.py)


# Memory, L2 reads and the size up to which they are fast: RRZE-HPC/gpu-benches at 1038c5d, of these cards; of the size
# about half, because two spectra share it and an L2 in two halves keeps some lines twice. 16-bit cuBLAS on an H200 is
# others' report. Estimates: all other rates; half of the issue slots at the usual clock. One launch every 2.5 µs in a
# stream is measured (same source), what programmatic dependent launch saves of it is not.
CEILINGS = Ceilings(
    bandwidth=4.2e12,
    l2_bandwidth=9.5e12,
    l2_bytes=24e6,
    cublas_flops={2: 650e12, 4: 40e12},  # tensor cores in 16 bits, CUDA cores in float32
    triton_flops={2: 500e12, 4: 150e12},  # float32 runs as three TF32 products on tensor cores
    tf32_flops=300e12,
    instructions=132 * 4 * 1.75e9 / 2,
    launch_seconds=2.5e-6,
    overlap_seconds=1e-6,
    fused_reals=16384,
)
# By a part of the device's name; other cards are taken for the one of their generation, or for an H200.
CARDS = {
    "H200": CEILINGS,
    "H100 PCIe": CEILINGS._replace(
        bandwidth=1.99e12,
        l2_bandwidth=6.9e12,
        l2_bytes=18e6,
        cublas_flops={2: 480e12, 4: 30e12},
        triton_flops={2: 370e12, 4: 110e12},
        tf32_flops=220e12,
        instructions=114 * 4 * 1.6e9 / 2,
    ),
    "A100": Ceilings(
        bandwidth=1.75e12,
        l2_bandwidth=5.4e12,
        l2_bytes=12e6,
        cublas_flops={2: 250e12, 4: 12e12},
        triton_flops={2: 200e12, 4: 40e12},
        tf32_flops=90e12,
        instructions=108 * 4 * 1.4e9 / 2,
        launch_seconds=2.5e-6,
        overlap_seconds=0.0,
        fused_reals=8192,
    ),
    "L40": Ceilings(
        bandwidth=0.8e12,
        l2_bandwidth=5.2e12,
        l2_bytes=48e6,
        cublas_flops={2: 240e12, 4: 45e12},
        triton_flops={2: 190e12, 4: 35e12},
        tf32_flops=80e12,
        instructions=142 * 4 * 2.2e9 / 2,
        launch_seconds=2.5e-6,
        overlap_seconds=0.0,
        fused_reals=8192,
    ),
}
_GENERATIONS = {"sm_80": "A100", "sm_86": "L40"}
# A byte written takes an L2 as long as so many bytes read: copies within a GH200's beside an H200's reads.
WRITTEN = 1.73


def ceilings_of(name: str, generation: str) -> Ceilings:
    """The ceilings of a card, by the device's name or by its generation (of `tiles.GENERATIONS`)."""
    family = next((family for family in CARDS if family in name), _GENERATIONS.get(generation, "H200"))
    return CARDS[family]


class Launch(NamedTuple):
    """What one launch moves and computes."""

    hbm_bytes: float  # read from and written to memory
    l2_bytes: float  # read through the L2, and `WRITTEN` times those written
    flops: float = 0.0
    instructions: float = 0.0  # of warps
    rate: float = inf  # FLOPs per second at best
    chain: float = 0.0  # seconds of dependent steps
    overlaps: bool = False  # may begin within the launch before


def streamed(read: float, written: float, flops: float = 0.0, rate: float = inf, found: float = 0.0) -> Launch:
    """A launch that reads and writes so many bytes once, of which some are found in the L2.

    Its rate is that of whole products, so that what tiles read again is in it.
    """
    return Launch(read + written - found, read + WRITTEN * written, flops, rate=rate)


def seconds(parts: Iterable[Launch], at: Ceilings) -> float:
    """The least that launches take one after the other: each its largest bound, and what a launch costs."""
    return sum(
        at.launch_seconds
        - at.overlap_seconds * part.overlaps
        + max(
            part.hbm_bytes / at.bandwidth,
            part.l2_bytes / at.l2_bandwidth,
            part.flops / part.rate,
            part.instructions / at.instructions,
            part.chain,
        )
        for part in parts
    )
