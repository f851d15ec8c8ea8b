"""Where the two trees live: the mesh, and how parameters, state and batches are cut over it.

32 devices, 8 domains:

                data ->   0    1    2    3      shared parameters: a copy on every device
    domain  legal      [ d0   d1   d2   d3 ]    expert "legal": only on d0..d3;
            med        [ d4   d5   d6   d7 ]    its gradient is reduced over these four,
            ...                                 shared gradients over all 32

A third axis, `model`, cuts heads and hidden units of both halves. With `mesh.shard` the devices
that would hold the same numbers hold a part of them each: of gradients and optimizer state
("optimizer"), or of parameters too ("params").

A batch has a row of sequences for every expert, or several where a domain has replicas: rows are
cut over `domain` and their sequences over `data`. The row of a replica may lie on other devices
than its expert: then a copy of the expert travels there in every step, and its gradient back (see
`training/replicas.py`). Where rows or experts do not divide over `domain`, empty ones are added.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.config.schema import MeshConfig, ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.optimizer import init_optimizer
from demix_jax.model.params import Params, Tree, init_params
from demix_jax.model.transformer import TENSOR_PARALLEL_DIMS
from demix_jax.parallel.mesh import BATCH_AXES, nontrivial_axes


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where a model with so many experts lives.

    Attributes:
      mesh: devices.
      model: shapes.
      experts: D.
      padded: the leading axis of experts' leaves, D or more; the experts beyond D are empty.
      params: how parameters are cut, a tree of `PartitionSpec` for each half.
      state: how gradients and the optimizer's moments are.
      offload: whether the optimizer's state is in the hosts' memory between steps.
    """

    mesh: Mesh
    model: ModelConfig
    experts: int
    padded: int
    params: Params
    state: Params
    offload: bool = False

    @property
    def groups(self) -> int:
        """Of devices that hold different experts."""
        return self.mesh.shape["domain"] if self.experts > 1 else 1

    @functools.cached_property
    def shapes(self) -> Params:
        """Of the parameters, float32."""
        return shapes_of(self.model, self.padded)

    @property
    def params_sharding(self) -> Params:
        """Of the parameters."""
        return self.shardings(self.params)

    def shardings(self, specs: Params) -> Params:
        """On the devices of this mesh, for a half or both."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def optimizer_sharding(
        self, optimizer: optax.GradientTransformation, moving: Params, *, kind: str | None = None
    ) -> Params:
        """Of the optimizer's state: moments as gradients are, counts of experts over `domain`.

        Args:
          optimizer: of each part.
          moving: with None for a half that is frozen.
          kind: of memory; None means where it is between steps.
        """
        halves = [None if half is None else self.shapes[i] for i, half in enumerate(moving)]
        found = jax.eval_shape(lambda p: init_optimizer(optimizer, p), Params(*halves))
        kind = kind or ("pinned_host" if self.offload else None)
        specs: list[Any] = []
        for state, spec, count in zip(found, self.state, self._counts, strict=True):
            if state is None:
                specs.append(None)
                continue
            specs.append(
                optax.tree_map_params(
                    optimizer,
                    lambda _, of_leaf: of_leaf,
                    state,
                    spec,
                    transform_non_params=lambda _, of_count=count: of_count,
                )
            )
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s, memory_kind=kind), Params(*specs))

    @property
    def _counts(self) -> tuple[PartitionSpec, PartitionSpec]:
        return PartitionSpec(), PartitionSpec(*(("domain",) if self.groups > 1 else ()))

    @property
    def batch(self) -> PartitionSpec:
        """Of batches [accumulate, S, B, ...]: S over `domain`, B over `data`, or B over both."""
        cut: tuple[tuple[str, ...], ...] = ((), BATCH_AXES)
        if self.experts > 1:
            cut = (("domain",), ("data",))
        wide = nontrivial_axes(self.mesh)
        return PartitionSpec(None, *(tuple(a for a in axes if a in wide) for axes in cut))

    @property
    def batch_sharding(self) -> NamedSharding:
        """See `batch`."""
        return NamedSharding(self.mesh, self.batch)

    def rows(self, slots: Sequence[int] = ()) -> tuple[int, ...]:
        """The expert of every row of a batch: of the slots, then of empty rows.

        Args:
          slots: the expert of each row with text; () means one for each of the D experts.
        """
        given = tuple(slots) or tuple(range(self.experts))
        each = -(-len(given) // self.groups)
        own = self.padded // self.groups
        empty = range(len(given), each * self.groups)
        if given == tuple(range(self.experts)) and each == own:
            return tuple(range(self.padded))
        return (*given, *(row // each * own for row in empty))


def make_layout(config: MeshConfig, mesh: Mesh, model: ModelConfig, experts: int) -> Layout:
    """Where everything lives; raises DemixError if the model does not divide over `model`.

    Args:
      config: with `shard` and `offload`.
      mesh: devices.
      model: shapes.
      experts: D; one feed-forward stack (dense baselines, the steps before branching) is
        everywhere.
    """
    _check_model(model, mesh.shape["model"])
    groups = mesh.shape["domain"] if experts > 1 else 1
    padded = -(-experts // groups) * groups
    shapes = shapes_of(model, padded)

    def specs(*, shard: bool) -> Params:
        def spec(path: Any, leaf: Any, half: str) -> PartitionSpec:
            names = [str(getattr(key, "key", key)) for key in path]
            part = half if half == "experts" else names[0]
            units = TENSOR_PARALLEL_DIMS.get(part, {})
            for name in names if half == "experts" else names[1:]:
                units = units.get(name) if isinstance(units, dict) else None
            rest = {"ends": 0, "layers": 1, "experts": 2}[part]
            stacked = half == "experts" and groups > 1
            return _spec(leaf.shape, mesh, rest, units or 0, stacked=stacked, shard=shard)

        return Params(
            *(
                jax.tree_util.tree_map_with_path(functools.partial(spec, half=half), tree)
                for half, tree in zip(Params._fields, shapes, strict=True)
            )
        )

    params = specs(shard=config.shard == "params")
    state = specs(shard=config.shard != "none")
    return Layout(mesh, model, experts, padded, params, state, config.offload)


def _spec(
    shape: tuple[int, ...], mesh: Mesh, rest: int, units: int, *, stacked: bool, shard: bool
) -> PartitionSpec:
    """How one leaf is cut.

    Args:
      shape: of the leaf.
      mesh: devices.
      rest: its leading dimensions, of experts and layers, that may not be cut further.
      units: its dimension of heads or hidden units, from the last; 0 if none.
      stacked: whether its first dimension is cut over `domain`.
      shard: whether devices that would hold the same numbers share them, over the largest
        dimension that divides. What does not divide stays whole.
    """
    wide = nontrivial_axes(mesh)
    cut: list[tuple[str, ...]] = [()] * len(shape)
    if stacked and "domain" in wide:
        cut[0] = ("domain",)
    if units and "model" in wide:
        cut[units] = ("model",)
    left = tuple(axis for axis in BATCH_AXES if axis in wide and axis not in cut[0])
    for axes in (left, left[1:]) if shard and left else ():
        ways = math.prod(mesh.shape[axis] for axis in axes)
        sizes = {
            d: shape[d] // math.prod(mesh.shape[axis] for axis in cut[d])
            for d in range(rest, len(shape))
        }
        fits = [d for d, size in sizes.items() if axes and size % ways == 0]
        if fits:
            best = max(fits, key=lambda d: (not cut[d], sizes[d]))
            cut[best] += axes
            break
    while cut and not cut[-1]:
        cut.pop()
    return PartitionSpec(*(axes if len(axes) > 1 else (axes[0] if axes else None) for axes in cut))


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a leaf is cut over, dimension by dimension."""
    return tuple(axis for axes in dim_axes(spec) for axis in axes)


def dim_axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The mesh axes that each dimension is cut over; () where it is not."""
    return [part if isinstance(part, tuple) else (part,) if part else () for part in spec]


def _check_model(model: ModelConfig, ways: int) -> None:
    """Raises DemixError unless heads, hidden units and positions divide over `model`."""
    chunk = model.loss_chunk or 1

    def fits(n: int) -> bool:
        own = model.context // n
        sizes = (model.heads, model.width, model.context)
        return all(size % n == 0 for size in sizes) and (chunk >= own or own % chunk == 0)

    if not fits(ways):
        able = [str(n) for n in range(1, model.heads + 1) if fits(n)]
        raise DemixError(
            f"mesh.model {ways} does not divide {model.heads} heads, width {model.width} and "
            f"context {model.context} (loss_chunk {model.loss_chunk}); use {', '.join(able)}"
        )


def shapes_of(model: ModelConfig, experts: int) -> Params:
    """Shapes of parameters, experts' leaves [experts, ...]."""
    return jax.eval_shape(lambda key: init_params(model, key, experts), jax.random.key(0))


def gather_leaves(tree: Tree, spec: Tree, axes: tuple[str, ...]) -> Tree:
    """Inside a program of one device: leaves brought together over `axes` where they are cut."""

    def gather(leaf: jax.Array, of_leaf: PartitionSpec) -> jax.Array:
        for dimension, cut in enumerate(dim_axes(of_leaf)):
            if over := tuple(axis for axis in cut if axis in axes):
                leaf = jax.lax.all_gather(leaf, over, axis=dimension, tiled=True)
        return leaf

    return jax.tree.map(gather, tree, spec)
