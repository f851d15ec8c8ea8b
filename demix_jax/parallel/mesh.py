"""The device mesh: axes domain, data and model over the devices of a job."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from demix_jax.config.schema import MeshConfig
from demix_jax.errors import DemixError

AXES = ("domain", "data", "model")
BATCH_AXES = AXES[:2]


def make_mesh(
    config: MeshConfig,
    num_experts: int,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a ("domain", "data", "model") mesh over all devices.

    Derived axes: `domain` is the largest group count that divides experts and devices, so that
    every device works on equally many experts; `data` takes the other devices. Five experts
    on three devices thus run data-parallel: domain 1, data 3. An explicit `domain` need not divide
    the experts: each group then has room for as many as the fullest.

    Args:
      config: explicit axes; 0 is derived.
      num_experts: D.
      devices: devices of the mesh; None means all, of all processes.

    Raises:
      DemixError: the axes do not multiply to the devices, or `domain` exceeds the experts.
    """
    devices = jax.devices() if devices is None else devices
    total, model = len(devices) // config.model, config.model
    domain = config.domain or (total // config.data if config.data else 0)
    domain = domain or math.gcd(num_experts, max(1, total))
    data = config.data or total // domain
    if domain * data * model != len(devices) or domain > num_experts:
        raise DemixError(_misfit_message(config, num_experts, len(devices)))
    return Mesh(_arrange(devices, (domain, data, model)), AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(devices: Sequence[jax.Device], shape: tuple[int, int, int]) -> Any:
    """Arranges devices [domain, data, model], so that the last axis has the fastest links."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:  # TPU slices joined by a slower network, which domains cross least
        domain = math.gcd(shape[0], slices)
        across = (domain, slices // domain, 1)
        if shape[1] % across[1]:
            raise DemixError(
                f"{slices} slices do not divide mesh {shape[0]}x{shape[1]}; "
                f"make mesh.domain x mesh.data a multiple of {slices}"
            )
        inside = tuple(size // n for size, n in zip(shape, across, strict=True))
        return mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    # An axis of the mesh may be part of one in a TPU slice: 8 x 8 on 4 x 4 x 4 chips.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _misfit_message(config: MeshConfig, experts: int, devices: int) -> str:
    total = devices // config.model
    fits = [d for d in range(1, min(experts, total) + 1) if total % d == 0]
    if devices % config.model:
        fits = []
        models = [str(m) for m in range(1, devices + 1) if devices % m == 0]
        hint = f"mesh.model must divide the devices: {', '.join(models)}"
    else:
        even = ", ".join(f"{d}x{total // d}" for d in fits if experts % d == 0)
        padded = ", ".join(f"{d}x{total // d}" for d in fits if experts % d)
        hint = f"domain x data can be {even}" + (f", or with empty places {padded}" * bool(padded))
    model = f" model={config.model}" if config.model > 1 else ""
    return (
        f"mesh domain={config.domain} data={config.data}{model} does not fit {experts} experts "
        f"on {devices} devices; {hint}"
    )


def nontrivial_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes with more than one device; others shard nothing and send nothing."""
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)


def check_batch(
    mesh: Mesh, groups: int, batch_size: int, grad_accum_steps: int, experts: int
) -> None:
    """Raises DemixError unless every row's sequences divide over microbatches and devices.

    A batch has a row of `batch_size` sequences for each of `groups` domains; a single expert folds
    all rows into one.
    """
    rows = groups if experts == 1 else 1
    ways = mesh.shape["data"] * (mesh.shape["domain"] if experts == 1 else 1)

    def fits(size: int) -> bool:
        return size % grad_accum_steps == 0 and rows * size // grad_accum_steps % ways == 0

    if not fits(batch_size):
        step = grad_accum_steps * ways // math.gcd(rows, ways)
        below = batch_size // step * step
        near = [size for size in range(below - step, below + 3 * step, step) if size > 0]
        shape = {axis: mesh.shape[axis] for axis in BATCH_AXES}
        raise DemixError(
            f"train.batch_size {batch_size} ({groups} domains, grad_accum_steps "
            f"{grad_accum_steps}) does not divide over the {shape} mesh with {experts} experts; "
            f"sizes that do: {', '.join(map(str, near))}"
        )
