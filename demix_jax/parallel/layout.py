"""The layout of parameters, optimizer state and batches on the mesh.

32 devices, 8 domains:

                data ->   0    1    2    3      shared parameters: a copy on every device
    domain  legal      [ d0   d1   d2   d3 ]    expert "legal": only on d0..d3;
            med        [ d4   d5   d6   d7 ]    its gradient is reduced over these four,
            ...                                 shared gradients over all 32

A third axis, `model`, shards heads and hidden units (tensor parallelism). With `mesh.shard`,
devices that would hold copies are sharded over too: gradients and optimizer state ("optimizer",
ZeRO), or parameters as well ("params", FSDP).

A batch has a row of sequences for every expert: rows are sharded over `domain` and their sequences
over `data`. If experts do not divide over `domain`, empty rows and experts are added. All of it
follows from the tree of parameters, the split of `model/params.py` and one table in
`model/transformer.py`, which names the dimensions of heads and hidden units.
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
from demix_jax.model.attention import resolve_kernel
from demix_jax.model.modules import TENSOR_PARALLEL_DIMS
from demix_jax.model.optimizer import init_optimizer
from demix_jax.model.params import Params, param_shapes, trainable_halves
from demix_jax.model.transformer import layer_axes
from demix_jax.parallel.mesh import BATCH_AXES, nontrivial_axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sharding of a model with D experts.

    Attributes:
      mesh: devices.
      model: shape of the model, with the kernel of attention that these devices use.
      experts: D.
      padded_experts: leading axis of the experts' leaves and number of rows of a batch, D or more;
        experts beyond D are empty.
      params: `PartitionSpec` of every parameter.
      state: the same for gradients and for optimizer state like them.
      offload_optimizer: True if optimizer state is in the hosts' memory between steps.
    """

    mesh: Mesh
    model: ModelConfig
    experts: int
    padded_experts: int
    params: Params
    state: Params
    offload_optimizer: bool = False

    def __hash__(self) -> int:  # equal ones find what is compiled for each other; dicts have none
        return hash((self.mesh, self.model, self.experts, self.offload_optimizer))

    @property
    def groups(self) -> int:
        """Returns the number of groups of devices that hold different experts."""
        return self.mesh.shape["domain"] if self.experts > 1 else 1

    @functools.cached_property
    def shapes(self) -> Params:
        """Returns the shapes of the parameters, float32."""
        return param_shapes(self.model, self.padded_experts)

    @property
    def params_sharding(self) -> Params:
        """Returns the sharding of every parameter."""
        return self.shardings(self.params)

    @property
    def least_bytes(self) -> int:
        """Returns the bytes that a train step needs on a device at least.

        They are of the parameters, and of the two moments of each that an expert owns.
        """

        def held(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> int:
            shard = NamedSharding(self.mesh, spec).shard_shape(leaf.shape)
            return math.prod(shard) * leaf.dtype.itemsize

        params = jax.tree.map(held, self.shapes, self.params)
        moments = jax.tree.map(held, self.shapes.experts, self.state.experts)
        ways = 0 if self.offload_optimizer else 2
        return sum(jax.tree.leaves(params)) + ways * sum(jax.tree.leaves(moments))

    def shardings(self, specs: Params) -> Params:
        """Returns specs of one or both halves as shardings on this mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def optimizer_sharding(
        self, optimizer: optax.GradientTransformation, trainable: Params, *, kind: str | None = None
    ) -> Params:
        """Returns the sharding of optimizer state: `state`, and step counts over `domain`.

        Args:
          optimizer: transformation of each part.
          trainable: any tree with None for a half that is frozen.
          kind: kind of memory; None means that of the state between steps.
        """
        shapes = trainable_halves(self.shapes, trainable)
        states = jax.eval_shape(functools.partial(init_optimizer, optimizer), shapes)
        counts = PartitionSpec(), PartitionSpec(*(("domain",) if self.groups > 1 else ()))
        kind = kind or ("pinned_host" if self.offload_optimizer else None)

        def specs(state: Any, params: Any, count: PartitionSpec) -> Any:
            return optax.tree_map_params(
                optimizer, lambda _, spec: spec, state, params, transform_non_params=lambda _: count
            )

        halves = zip(states, self.state, counts, strict=True)
        tree = Params(*(None if half[0] is None else specs(*half) for half in halves))
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec, memory_kind=kind), tree)

    @property
    def batch(self) -> PartitionSpec:
        """Returns the spec of batches [grad_accum_steps, S, B, ...].

        S is sharded over `domain` and B over `data`; with one expert, B over both.
        """
        dims = (("domain",), ("data",)) if self.experts > 1 else ((), BATCH_AXES)
        axes = nontrivial_axes(self.mesh)
        return PartitionSpec(None, *(tuple(a for a in dim if a in axes) for dim in dims))

    @property
    def batch_sharding(self) -> NamedSharding:
        """Returns `batch` as a sharding on this mesh."""
        return NamedSharding(self.mesh, self.batch)


def make_layout(config: MeshConfig, mesh: Mesh, model: ModelConfig, experts: int) -> Layout:
    """Lays a model out on a mesh, and chooses the kernel of attention for its devices.

    A single expert (dense baselines, the steps before branching) is on every device.

    Args:
      config: mesh settings; only `shard` and `offload_optimizer` count here.
      mesh: devices to lay the model out on.
      model: shape of the model.
      experts: D.

    Raises:
      DemixError: the model does not divide over `model`, or `model.attention` names a kernel that
        does not fit.
    """
    _check_model(model, mesh.shape["model"])
    groups = mesh.shape["domain"] if experts > 1 else 1
    padded = -(-experts // groups) * groups
    shapes = param_shapes(model, padded)

    def specs(*, shard: bool) -> Params:
        def spec(key_path: Any, leaf: Any, stacked: int) -> PartitionSpec:
            path = [key.key for key in key_path]
            leading, by_domain = stacked + layer_axes(path), bool(stacked) and groups > 1
            dim = _tensor_parallel_dim(path, len(leaf.shape) - leading)
            return _spec(leaf.shape, mesh, leading, dim, by_domain=by_domain, shard=shard)

        return Params(
            *(
                jax.tree.map_with_path(functools.partial(spec, stacked=stacked), half)
                for stacked, half in enumerate(shapes)
            )
        )

    params = specs(shard=config.shard == "params")
    state = specs(shard=config.shard != "none")
    device = mesh.devices.flat[0]
    kernel = resolve_kernel(model, getattr(device, "hardware", device))  # real, or planned for
    model = dataclasses.replace(model, attention=kernel)
    return Layout(mesh, model, experts, padded, params, state, config.offload_optimizer)


def _tensor_parallel_dim(path: Sequence[str], dims: int) -> int:
    """Returns a leaf's dimension of heads or hidden units, counted from the last; 0 if none.

    Args:
      path: names down to the leaf.
      dims: number of its dimensions, without those of experts and layers.
    """
    node: Any = TENSOR_PARALLEL_DIMS
    for name in path:
        node = node.get(name, 0) if isinstance(node, dict) else 0
    return node if isinstance(node, int) and -node <= dims else 0


def _spec(
    shape: tuple[int, ...], mesh: Mesh, leading: int, dim: int, *, by_domain: bool, shard: bool
) -> PartitionSpec:
    """Returns the spec of one leaf.

    Args:
      shape: shape of the leaf.
      mesh: devices.
      leading: number of leading dimensions, of experts and layers, that `shard` leaves alone.
      dim: dimension of heads or hidden units, from the last; 0 if none.
      by_domain: True if the first dimension is sharded over `domain`.
      shard: True if devices that would hold copies shard the largest dimension that divides; a leaf
        without one is replicated.
    """
    wide = nontrivial_axes(mesh)
    axes_of: list[tuple[str, ...]] = [()] * len(shape)
    if by_domain and "domain" in wide:
        axes_of[0] = ("domain",)
    if dim and "model" in wide:
        axes_of[dim] = ("model",)
    copies = tuple(axis for axis in BATCH_AXES if axis in wide and axis not in axes_of[0])
    for axes in (copies, copies[1:]) if shard and copies else ():
        ways = math.prod(mesh.shape[axis] for axis in axes)
        sizes = {
            d: shape[d] // math.prod(mesh.shape[axis] for axis in axes_of[d])
            for d in range(leading, len(shape))
        }
        fits = [d for d, size in sizes.items() if axes and size % ways == 0]
        if fits:
            best = max(fits, key=lambda d: (not axes_of[d], sizes[d]))
            axes_of[best] += axes
            break
    while axes_of and not axes_of[-1]:
        axes_of.pop()
    dims = (axes if len(axes) > 1 else (axes[0] if axes else None) for axes in axes_of)
    return PartitionSpec(*dims)


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Returns the mesh axes that a leaf is sharded over, dimension by dimension."""
    return tuple(axis for axes in dim_axes(spec) for axis in axes)


def dim_axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Returns the mesh axes that each dimension is sharded over; () if none."""
    return [part if isinstance(part, tuple) else (part,) if part else () for part in spec]


def gather_leaf(leaf: jax.Array, spec: PartitionSpec, axes: Sequence[str]) -> jax.Array:
    """Gathers a leaf along those of its sharded dimensions that `axes` shard, inside shard_map."""
    for dimension, sharded in enumerate(dim_axes(spec)):
        if over := tuple(axis for axis in sharded if axis in axes):
            leaf = jax.lax.all_gather(leaf, over, axis=dimension, tiled=True)
    return leaf


def _check_model(model: ModelConfig, ways: int) -> None:
    """Raises DemixError unless heads, hidden units and positions divide over `model`.

    Heads are those of keys: a device has the heads of queries that they serve.
    """
    chunk = model.logits_chunk or 1

    def fits(n: int) -> bool:
        own = model.context // n
        sizes = (model.key_heads, model.ffn_width, model.context)
        return all(size % n == 0 for size in sizes) and (chunk >= own or own % chunk == 0)

    if not fits(ways):
        able = [str(n) for n in range(1, model.key_heads + 1) if fits(n)]
        heads = f"{model.heads} heads"
        if model.key_heads != model.heads:
            heads = f"{model.key_heads} heads of keys (model.kv_heads)"
        raise DemixError(
            f"mesh.model {ways} does not divide {heads}, {model.ffn_width} hidden units and "
            f"context {model.context} (logits_chunk {model.logits_chunk}); use {', '.join(able)}"
        )
