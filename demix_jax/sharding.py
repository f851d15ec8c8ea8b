"""Where the two trees live: the mesh, and the sharding that follows from `Params`.

32 devices, 8 domains:

                data ->   0    1    2    3      shared parameters: a copy on every device
    domain  legal      [ d0   d1   d2   d3 ]    expert "legal": only on d0..d3;
            med        [ d4   d5   d6   d7 ]    its gradient is reduced over these four,
            ...                                 shared gradients over all 32
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from demix_jax.config import MeshConfig
from demix_jax.errors import DemixError
from demix_jax.params import Params


def make_mesh(
    config: MeshConfig, num_experts: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A ("domain", "data") mesh over all devices.

    Derived axes: `domain` is the largest group count that divides both experts and devices, so
    that every device works on equally many experts; `data` takes the other devices. Five experts
    on three devices thus run data-parallel: domain 1, data 3.

    Raises:
      DemixError: the asked axes do not multiply to the devices or do not divide the experts.
    """
    devices = jax.devices() if devices is None else devices
    total = len(devices)
    domain = config.domain or (total // config.data if config.data else 0)
    domain = domain or math.gcd(num_experts, total)
    data = config.data or total // domain
    if domain * data != total or num_experts % domain:
        fits = [
            f"{d}x{total // d}" for d in range(1, total + 1) if total % d == num_experts % d == 0
        ]
        raise DemixError(
            f"mesh domain={config.domain} data={config.data} does not fit {num_experts} experts on "
            f"{total} devices; domain x data can be {', '.join(fits)}"
        )
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((domain, data), ("domain", "data"), types, devices=devices)


def params_sharding(mesh: Mesh, num_experts: int) -> Params:
    """Shardings of parameters or optimizer state: trunk everywhere, experts over `domain`.

    A single expert (dense baselines, the steps before branching) is everywhere too.
    """
    split = PartitionSpec("domain" if num_experts > 1 else None)
    return Params(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, split))


def place(params: Params, shardings: Params) -> Params:
    """Puts both halves where they live."""
    return Params(*(jax.device_put(tree, to) for tree, to in zip(params, shardings, strict=True)))


def batch_sharding(mesh: Mesh, num_experts: int) -> NamedSharding:
    """Of batches [accumulate, D, B, ...]: D over `domain`, B over `data`, or B over both if D=1."""
    if num_experts > 1:
        return NamedSharding(mesh, PartitionSpec(None, "domain", "data"))
    return NamedSharding(mesh, PartitionSpec(None, None, ("domain", "data")))


def check_batch(mesh: Mesh, groups: int, batch_size: int, accumulate: int, experts: int) -> None:
    """Raises DemixError unless `groups * batch_size` sequences divide over experts and devices."""
    ways = mesh.size if experts == 1 else mesh.shape["data"]

    def fits(size: int) -> bool:
        return size % accumulate == 0 and (groups * size // (accumulate * experts)) % ways == 0

    if not fits(batch_size):
        limit = batch_size + accumulate * experts * mesh.size
        sizes = [str(s) for s in range(1, limit + 1) if fits(s)]
        near = sorted(sizes, key=lambda s: abs(int(s) - batch_size))[:4]
        raise DemixError(
            f"train.batch_size {batch_size} ({groups} domains, accumulate {accumulate}) does not "
            f"divide over the {dict(mesh.shape)} mesh with {experts} experts; "
            f"sizes that do: {', '.join(sorted(near, key=int)) or 'none'}"
        )
