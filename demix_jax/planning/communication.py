"""Collectives of the train step on any mesh, leaf by leaf, from the definitions of `train_step.py`.

Each device runs all microbatches alone, and gradients are then summed once over the devices that
hold the same parameters. To this adds up what the layout asks for:

  mesh.shard=optimizer   sums end where a part of the state is (reduce-scatter), and the new
                         parameters are gathered: as much as one sum
  mesh.shard=params      every microbatch gathers each layer twice, forward and backward, and
                         reduce-scatters its gradient; the embeddings once. Parameters travel in
                         the type that is computed with
  mesh.model             every layer sums [sequences, T, E] after attention and after the FFN,
                         forward and backward, and attention's once more where it is recomputed (the
                         FFN's too if a norm follows it); a norm over all heads sums the squares
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from demix_jax.model.modules import TENSOR_PARALLEL_DIMS
from demix_jax.model.params import Params
from demix_jax.model.transformer import layer_axes
from demix_jax.parallel.layout import Layout, spec_axes
from demix_jax.parallel.mesh import BATCH_AXES, nontrivial_axes
from demix_jax.planning.hlo_collectives import EXPERT, SHARED, ring_bytes
from demix_jax.planning.planned_step import PlannedStep

PARTS = Params(SHARED, EXPERT)


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """Arrays of one kind that devices exchange along some axes.

    Attributes:
      part: "shared" or "expert", with " activations" for what is no parameter.
      kind: kind of collective, in XLA's words.
      axes: mesh axes.
      devices: number of devices along `axes`.
      payload: bytes on a device: of what it adds to a sum, or of a gather's result.
      times: executions in a step.
      in_layers: True if it runs among the layers, once for each of them and microbatch.
    """

    part: str
    kind: str
    axes: tuple[str, ...]
    devices: int
    payload: float
    times: int = 1
    in_layers: bool = False

    @property
    def sent_per_run(self) -> float:
        """Returns the bytes that a device sends in a step."""
        return self.times * ring_bytes(self.kind, self.payload, self.devices)


class Leaf(NamedTuple):
    """A leaf of the parameters and its sharding.

    Attributes:
      half: 0 for a shared leaf, 1 for the experts'.
      path: names down to it.
      shape: float32 numbers of all devices.
      params: spec of the parameter.
      state: spec of its gradient and optimizer state.
    """

    half: int
    path: tuple[str, ...]
    shape: tuple[int, ...]
    params: PartitionSpec
    state: PartitionSpec

    @property
    def gathered_axes(self) -> tuple[str, ...]:
        """Returns the axes along which the parameter is gathered before it is used (FSDP)."""
        inner = spec_axes(PartitionSpec(*self.params[self.half :]))
        return tuple(axis for axis in BATCH_AXES if axis in inner)


def layout_leaves(layout: Layout) -> Iterator[Leaf]:
    """Yields every leaf of a layout's parameters."""
    for half, (shapes, *specs) in enumerate(
        zip(layout.shapes, layout.params, layout.state, strict=True)
    ):
        both = zip(*map(jax.tree.leaves, specs), strict=True)
        for (path, leaf), (params, state) in zip(
            jax.tree.leaves_with_path(shapes), both, strict=True
        ):
            yield Leaf(half, tuple(key.key for key in path), leaf.shape, params, state)


def device_size(layout: Layout, shape: tuple[int, ...], spec: PartitionSpec) -> int:
    """Counts the numbers of an array that one device holds."""
    return math.prod(NamedSharding(layout.mesh, spec).shard_shape(shape))


def owner(params: Params, *path: str) -> int:
    """Returns 1 if experts own leaves below `path` of the full tree, else 0."""
    node = params.experts
    for name in path:
        node = node.get(name, {})
    return int(bool(node))


def step_collectives(step: PlannedStep) -> list[CollectiveCost]:
    """Lists what a step sends, except norms, counts and losses."""
    layout, grad_accum_steps = step.layout, step.config.train.grad_accum_steps
    costs: list[CollectiveCost] = []
    for leaf in layout_leaves(layout):
        trained = step.trainable[leaf.half] is not None
        if trained:
            costs += _gradient_sums(layout, leaf)
        costs += _layer_gathers(layout, leaf, grad_accum_steps, trained)
    costs += _activation_sums(step)
    totals: dict[CollectiveCost, float] = {}  # alike in all but payload
    for cost in costs:
        key = dataclasses.replace(cost, payload=0)
        totals[key] = totals.get(key, 0.0) + cost.payload
    return [dataclasses.replace(key, payload=payload) for key, payload in totals.items()]


def _gradient_sums(layout: Layout, leaf: Leaf) -> Iterator[CollectiveCost]:
    """Yields the sum of a leaf's gradient, and its gather where state is sharded further."""
    held, state = spec_axes(leaf.params), spec_axes(leaf.state)
    part, axes = PARTS[leaf.half], nontrivial_axes(layout.mesh)
    payload: float = 4 * device_size(layout, leaf.shape, leaf.params)
    if over := tuple(a for a in axes if a in state and a not in held):
        devices = _devices(layout, over)
        yield CollectiveCost(part, "reduce-scatter", over, devices, payload)
        yield CollectiveCost(part, "all-gather", over, devices, payload)
        payload /= devices
    if over := tuple(a for a in axes if a not in state):
        yield CollectiveCost(part, "all-reduce", over, _devices(layout, over), payload)


def _layer_gathers(
    layout: Layout, leaf: Leaf, grad_accum_steps: int, trained: bool
) -> Iterator[CollectiveCost]:
    """Yields the gathers of a sharded parameter and the reduce-scatters of its gradient."""
    if over := leaf.gathered_axes:
        part, devices = PARTS[leaf.half], _devices(layout, over)
        whole = devices * device_size(layout, leaf.shape, leaf.params)
        compute = jnp.dtype(layout.model.dtype).itemsize
        for kind, itemsize, passes in (
            ("all-gather", compute, 1 + layer_axes(leaf.path)),
            ("reduce-scatter", 4, 1),
        )[: 1 + trained]:
            times = grad_accum_steps * passes
            yield CollectiveCost(part, kind, over, devices, itemsize * whole, times, in_layers=True)


def _activation_sums(step: PlannedStep) -> Iterator[CollectiveCost]:
    """Yields the sums of a layer's activations over the devices that share its work."""
    layout, grad_accum_steps = step.layout, step.config.train.grad_accum_steps
    model, ways = layout.model, layout.mesh.shape["model"]
    if ways == 1:
        return
    payload = jnp.dtype(model.dtype).itemsize * step.device_sequences * model.context * model.width
    modules = list(TENSOR_PARALLEL_DIMS["layers"])  # in the order in which a layer runs them
    for module in modules:
        part = f"{PARTS[owner(layout.shapes, 'layers', module)]} activations"
        # The last sum of a layer is its result, which its backward pass does not need, unless a
        # norm has made the result of it.
        last = module == modules[-1] and model.norm_place == "pre"
        times = (2 + (model.remat != "none" and not last)) * model.layers * grad_accum_steps
        yield CollectiveCost(part, "all-reduce", ("model",), ways, payload, times, in_layers=True)
    if model.qk_norm == "all":
        part = f"{PARTS[owner(layout.shapes, 'layers', 'attention')]} activations"
        squares = 4 * 2 * step.device_sequences * model.context  # of queries, of keys
        times = (2 + (model.remat != "none")) * model.layers * grad_accum_steps
        yield CollectiveCost(part, "all-reduce", ("model",), ways, squares, times, in_layers=True)


def _devices(layout: Layout, axes: tuple[str, ...]) -> int:
    return math.prod(layout.mesh.shape[axis] for axis in axes)
