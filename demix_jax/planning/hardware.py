"""Accelerators as their makers state them, and the TPU slices that can be planned for.

Numbers are of one device of JAX: a GPU, or a chip of a TPU. Bytes are powers of 1000 except HBM.
Links are what one device can send in one direction; NVIDIA states the sum of both directions.
"""

import dataclasses
import math
from collections.abc import Sequence

from demix_jax.errors import DemixError, suggest

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device.

    Attributes:
      name: name on the command line.
      hbm: bytes of memory that a program can use.
      flops: FLOPs per second, dense matrix products of bfloat16 (V100: float16).
      bandwidth: bytes per second of HBM, read and written.
      link: bytes per second that a device sends inside a node or slice, in a ring.
      network: bytes per second that a device sends across nodes or slices.
      node: number of devices that `link` connects; 0 means a whole TPU slice.
      slices: shapes of TPU slices that exist; () for GPUs.
      attention_copies: copies of a layer's attention weights that XLA keeps in the backward pass,
        in float32 and in the type that is computed with.
      compute_capability: CUDA's name of a GPU's generation; "" for TPUs.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    link: float
    network: float
    node: int = 0
    slices: tuple[str, ...] = ()
    attention_copies: tuple[int, int] = (1, 2)
    compute_capability: str = ""

    @property
    def platform(self) -> str:
        """Returns JAX's name of the platform."""
        return "gpu" if self.node else "tpu"


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16"),
)
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: HBM, peak, bandwidth, slice shapes. A ring
# along one axis of the torus uses a link in each direction: 2 x 45e9 (v4, v5e) or 2 x 90e9 (v5p,
# v6e). Links, and a chip's share of its host's network: jax-ml.github.io/scaling-book/tpus. HBM is
# what libtpu's compiler leaves to a program: 15.75 of 16 GiB on v5e.
# GPUs: NVIDIA's data sheets of the SXM boards, and the DGX of each: one 400 Gb/s (H100), 200 Gb/s
# (A100) port for every GPU, four of 100 Gb/s for eight V100. HBM is what nvidia-smi shows, less 1
# GiB for the driver and NCCL; JAX takes 75 % of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
HARDWARE = {
    known.name: known
    for known in (
        Hardware("h100", 78.6 * GIB, 989e12, 3.35e12, 450e9, 50e9, 8, (), (2, 1), "9.0"),
        Hardware("a100", 78.6 * GIB, 312e12, 2.04e12, 300e9, 25e9, 8, (), (2, 1), "8.0"),
        Hardware("v100", 30.7 * GIB, 125e12, 0.90e12, 150e9, 6.25e9, 8, (), (2, 1), "7.0"),
        Hardware("v4", 31.75 * GIB, 275e12, 1.23e12, 90e9, 6.25e9),
        Hardware("v5e", 15.75 * GIB, 197e12, 0.82e12, 90e9, 3.125e9, 0, _FLAT, (1, 1)),
        Hardware("v5p", 95.74 * GIB, 459e12, 2.77e12, 180e9, 6.25e9, 0, _CUBES),
        Hardware("v6e", 31.25 * GIB, 918e12, 1.64e12, 180e9, 12.5e9, 0, _FLAT, (1, 1)),
    )
}


def find_hardware(name: str) -> Hardware:
    """Returns the hardware of that name in any case, or raises DemixError that lists all."""
    if name.lower() not in HARDWARE:
        raise DemixError(
            f"unknown hardware {name!r}; choose from {', '.join(HARDWARE)}{suggest(name, HARDWARE)}"
        )
    return HARDWARE[name.lower()]


def find_topology(topology: str) -> tuple[Hardware, int]:
    """Returns the hardware of a TPU slice such as "v5p:4x4x4", and its number of devices.

    Raises:
      DemixError: there is no such slice; lists those that there are.
    """
    kind, _, shape = topology.partition(":")
    slices = HARDWARE[kind].slices if kind in HARDWARE else ()
    if shape not in slices:
        names = [f"{k}:{', '.join(h.slices)}" for k, h in HARDWARE.items() if h.slices]
        raise DemixError(f"unknown topology {topology!r}; there are {'; '.join(names)}")
    return HARDWARE[kind], math.prod(map(int, shape.split("x")))


def ring_bandwidth(hardware: Hardware, devices: Sequence[int]) -> float:
    """Returns the bytes per second that each of `devices` sends around a ring through all of them.

    Where the ring crosses nodes, every device of a node carries a part of it over its own port.
    Nodes have consecutive devices.
    """
    if not hardware.node or len({d // hardware.node for d in devices}) == 1:
        return hardware.link
    ports = sum(d // hardware.node == devices[0] // hardware.node for d in devices)
    return min(hardware.link, ports * hardware.network)
