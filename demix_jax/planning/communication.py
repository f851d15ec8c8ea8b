"""What the train step sends on any mesh, array by array, by the definitions of `train_step.py`.

Each device alone runs all microbatches, and gradients are then summed once over the devices that
hold the same parameters. To this adds up what the layout asks for:

  mesh.shard=optimizer   sums end where a part of the state is (reduce-scatter), and the new
                         parameters are gathered: as much as one sum
  mesh.shard=params      every microbatch gathers each layer twice, forward and backward, and
                         reduce-scatters its gradient; the embeddings once. Parameters travel in
                         the type that is computed with
  mesh.model             every layer joins [sequences, T, E] twice forward and twice backward, and
                         attention's once more where it is recomputed
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from demix_jax.model.transformer import Tree, layer_axes
from demix_jax.parallel.layout import Layout, spec_axes
from demix_jax.parallel.mesh import BATCH_AXES, nontrivial_axes
from demix_jax.planning.hlo_collectives import ring_bytes


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """Arrays of one kind that a device exchanges with those along some axes.

    Attributes:
      part: "shared", "expert", or "activations".
      kind: of collective, in XLA's words.
      axes: of the mesh.
      payload: bytes on a device: what it adds to a sum, what a gather makes.
      times: in a step.
      within: whether it runs among the layers, once for each of them and microbatch.
    """

    part: str
    kind: str
    axes: tuple[str, ...]
    payload: float
    times: int = 1
    within: bool = False

    def sent(self, layout: Layout) -> float:
        """Bytes that a device sends in a step."""
        devices = math.prod(layout.mesh.shape[axis] for axis in self.axes)
        return self.times * ring_bytes(self.kind, self.payload, devices)


def held_numbers(layout: Layout, shapes: Tree, specs: Tree) -> int:
    """How many numbers a device holds of leaves that are cut so."""
    shards = zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True)
    return sum(
        math.prod(NamedSharding(layout.mesh, spec).shard_shape(leaf.shape)) for leaf, spec in shards
    )


def step_exchanges(layout: Layout, sequences: int, grad_accum_steps: int) -> list[CollectiveCost]:
    """Everything but norms, counts and losses.

    Args:
      layout: of everything.
      sequences: that a device works on at once.
      grad_accum_steps: microbatches.
    """
    found: list[CollectiveCost] = []
    compute = jnp.dtype(layout.model.dtype).itemsize
    for part, half in (("shared", "shared"), ("expert", "experts")):
        shapes, held, asked = (
            getattr(t, half) for t in (layout.shapes, layout.params, layout.state)
        )
        leaves = zip(
            jax.tree.leaves_with_path(shapes), *map(jax.tree.leaves, (held, asked)), strict=True
        )
        for (path, leaf), had, kept in leaves:
            own = held_numbers(layout, leaf, had)
            stacked = layer_axes([key.key for key in path]) > 0
            found += _summed(layout, part, 4 * own, had, kept)
            found += _gathered(layout, part, own, had, compute, grad_accum_steps, stacked=stacked)
    found += _joined(layout, sequences, grad_accum_steps, compute)
    return _merged(found)


def _summed(
    layout: Layout, part: str, payload: float, held: PartitionSpec, asked: PartitionSpec
) -> Iterator[CollectiveCost]:
    """A leaf's gradient, after the microbatches, and the leaf, where state is cut finer."""
    had, kept = spec_axes(held), spec_axes(asked)
    if over := tuple(a for a in nontrivial_axes(layout.mesh) if a in kept and a not in had):
        yield CollectiveCost(part, "reduce-scatter", over, payload)
        yield CollectiveCost(part, "all-gather", over, payload)
        payload /= math.prod(layout.mesh.shape[axis] for axis in over)
    if over := tuple(a for a in nontrivial_axes(layout.mesh) if a not in kept):
        yield CollectiveCost(part, "all-reduce", over, payload)


def _gathered(
    layout: Layout,
    part: str,
    own: int,
    held: PartitionSpec,
    compute: int,
    grad_accum_steps: int,
    *,
    stacked: bool,
) -> Iterator[CollectiveCost]:
    """A leaf that is cut between microbatches: brought together, and its gradient taken apart."""
    places = ("domain", *BATCH_AXES[1:]) if part == "shared" or layout.groups == 1 else ("data",)
    over = tuple(a for a in nontrivial_axes(layout.mesh) if a in places and a in spec_axes(held))
    if over:
        whole = own * math.prod(layout.mesh.shape[axis] for axis in over)
        times = grad_accum_steps * (2 if stacked else 1)
        yield CollectiveCost(part, "all-gather", over, compute * whole, times, within=True)
        yield CollectiveCost(part, "reduce-scatter", over, 4 * whole, grad_accum_steps, within=True)


def _joined(
    layout: Layout, sequences: int, grad_accum_steps: int, compute: int
) -> Iterator[CollectiveCost]:
    """Products of heads and hidden units that several devices share."""
    if layout.mesh.shape["model"] > 1:
        model = layout.model
        payload = compute * sequences * model.context * model.width
        for part, times in (("shared", 2 + (model.remat != "none")), ("expert", 2)):
            yield CollectiveCost(
                f"{part} activations",
                "all-reduce",
                ("model",),
                payload,
                times * model.layers * grad_accum_steps,
                within=True,
            )


def _merged(found: list[CollectiveCost]) -> list[CollectiveCost]:
    """Exchanges alike in all but payload as one."""
    totals: dict[CollectiveCost, float] = {}
    for e in found:
        key = dataclasses.replace(e, payload=0)
        totals[key] = totals.get(key, 0.0) + e.payload
    return [dataclasses.replace(key, payload=payload) for key, payload in totals.items()]


def bytes_by_part(
    found: list[CollectiveCost], layout: Layout
) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a device sends in a step, by part and mesh axes."""
    totals: dict[tuple[str, tuple[str, ...]], float] = {}
    for e in found:
        totals[e.part, e.axes] = totals.get((e.part, e.axes), 0.0) + e.sent(layout)
    return totals
