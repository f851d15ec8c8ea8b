"""Where the two trees live: the mesh, and the sharding that follows from `Params`.

32 devices, 8 domains:

                data ->   0    1    2    3      shared parameters: a copy on every device
    domain  legal      [ d0   d1   d2   d3 ]    expert "legal": only on d0..d3;
            med        [ d4   d5   d6   d7 ]    its gradient is reduced over these four,
            ...                                 shared gradients over all 32

A batch has a row of sequences for every expert, or several where a domain has replicas: rows are
cut over `domain` and their sequences over `data`. The row of a replica may lie on other devices
than its expert: then a copy of the expert travels there in every step, and its gradient back (see
`replicas.py`).
"""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from demix_jax.config import MeshConfig
from demix_jax.errors import DemixError
from demix_jax.params import Params

AXES = ("domain", "data")


def make_mesh(
    config: MeshConfig,
    num_experts: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    num_slots: int = 0,
) -> Mesh:
    """A ("domain", "data") mesh over all devices.

    Derived axes: `domain` is the largest group count that divides experts, slots and devices, so
    that every device works on equally many experts; `data` takes the other devices. Five experts
    on three devices thus run data-parallel: domain 1, data 3.

    Args:
      config: axes that are asked for.
      num_experts: D.
      devices: to use; None means all.
      num_slots: rows of a training batch, where experts have replicas; 0 means D.

    Raises:
      DemixError: the asked axes do not multiply to the devices or do not divide the experts.
    """
    devices = jax.devices() if devices is None else devices
    total = len(devices)
    groups = math.gcd(num_experts, num_slots)  # num_experts where num_slots is 0
    domain = config.domain or (total // config.data if config.data else 0)
    domain = domain or math.gcd(groups, total)
    data = config.data or total // domain
    if domain * data != total or groups % domain:
        fits = [f"{d}x{total // d}" for d in range(1, total + 1) if total % d == groups % d == 0]
        slots = f" with {num_slots} replicas" if num_slots not in (0, num_experts) else ""
        raise DemixError(
            f"mesh domain={config.domain} data={config.data} does not fit {num_experts} experts"
            f"{slots} on {total} devices; domain x data can be {', '.join(fits)}"
        )
    # An axis of the mesh may be part of one in a TPU slice: 8 x 8 on 4 x 4 x 4 chips.
    placed = mesh_utils.create_device_mesh((domain, data), devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def wide_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes with more than one device: along others nothing is cut and nothing sent."""
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)


def params_specs(mesh: Mesh, num_experts: int) -> Params:
    """Where parameters or optimizer state are cut: the trunk nowhere, experts over `domain`.

    A single expert (dense baselines, the steps before branching) is everywhere too.
    """
    split = num_experts > 1 and "domain" in wide_axes(mesh)
    return Params(PartitionSpec(), PartitionSpec("domain") if split else PartitionSpec())


def params_sharding(mesh: Mesh, num_experts: int) -> Params:
    """Shardings of both halves (see `params_specs`)."""
    return Params(*(NamedSharding(mesh, spec) for spec in params_specs(mesh, num_experts)))


def axes_of_copies(mesh: Mesh, num_experts: int) -> Params:
    """The axes along which devices hold the same parameters, of each half."""
    specs = params_specs(mesh, num_experts)
    return Params(*(tuple(a for a in wide_axes(mesh) if a not in spec) for spec in specs))


def place(params: Params, shardings: Params) -> Params:
    """Puts both halves where they live."""
    return Params(*(jax.device_put(tree, to) for tree, to in zip(params, shardings, strict=True)))


def batch_spec(mesh: Mesh, num_experts: int) -> PartitionSpec:
    """Of batches [accumulate, S, B, ...]: S over `domain`, B over `data`, or B over both if D=1."""
    cut: tuple[tuple[str, ...], ...] = ((), AXES) if num_experts == 1 else (("domain",), ("data",))
    wide = wide_axes(mesh)
    return PartitionSpec(None, *(tuple(axis for axis in axes if axis in wide) for axes in cut))


def batch_sharding(mesh: Mesh, num_experts: int) -> NamedSharding:
    """Of batches (see `batch_spec`)."""
    return NamedSharding(mesh, batch_spec(mesh, num_experts))


def check_batch(
    mesh: Mesh, groups: int, batch_size: int, accumulate: int, experts: int, *, slots: int = 0
) -> None:
    """Raises DemixError unless every row's sequences divide over microbatches and devices.

    Args:
      mesh: devices.
      groups: domains; they are the rows of a batch to validate on.
      batch_size: sequences in a row.
      accumulate: microbatches.
      experts: 1 folds all rows into one.
      slots: rows of a batch to train on; 0 means `groups`.
    """
    rows = {groups, slots or groups} if experts == 1 else {1}
    ways = mesh.size if experts == 1 else mesh.shape["data"]

    def fits(size: int) -> bool:
        whole = size % accumulate == 0
        return whole and all(n * size // accumulate % ways == 0 for n in rows)

    if not fits(batch_size):
        limit = batch_size + accumulate * experts * mesh.size
        sizes = [str(s) for s in range(1, limit + 1) if fits(s)]
        near = sorted(sizes, key=lambda s: abs(int(s) - batch_size))[:4]
        raise DemixError(
            f"train.batch_size {batch_size} ({groups} domains, accumulate {accumulate}) does not "
            f"divide over the {dict(mesh.shape)} mesh with {experts} experts; "
            f"sizes that do: {', '.join(sorted(near, key=int)) or 'none'}"
        )
