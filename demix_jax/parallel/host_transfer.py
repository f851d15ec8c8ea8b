"""Parameters and optimizer state between the hosts of a job and its devices.

A host reads and writes whole experts, and only those that its devices hold. Among the processes
whose devices hold an expert, one is its owner, which copies it to its host to be written.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.model.params import Params, Tree


def local_experts(mesh: Mesh, experts: int, padded: int) -> tuple[int, ...]:
    """Returns the indices of the experts that devices of this process hold, in order."""
    spec = PartitionSpec("domain") if experts > 1 else PartitionSpec()
    slices = NamedSharding(mesh, spec).addressable_devices_indices_map((padded,)).values()
    return tuple(sorted({i for index in slices if index for i in range(experts)[index[0]]}))


def host_to_devices(
    tree: Params, local: Sequence[int], experts: int, padded: int, shardings: Params
) -> Params:
    """Puts what every process has on its host on the devices of all.

    Args:
      tree: parameters or optimizer state on the host, experts' leaves [len(local), ...]; a half
        that is None stays so.
      local: indices of these experts.
      experts: D.
      padded: leading axis of the result; experts from D on are zeros.
      shardings: shardings of the result, whose experts' leaves are [padded, ...].
    """
    offsets = {expert: i for i, expert in enumerate(local)}

    def slice_experts(leaf: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        empty = np.zeros_like(leaf[0])
        each = (leaf[offsets[i]] if i < experts else empty for i in range(padded)[index[0]])
        return np.stack([expert[index[1:]] for expert in each])

    def put_expert(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (padded, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, functools.partial(slice_experts, leaf))

    def put_shared(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return Params(
        *(
            None if half is None else jax.tree.map(put, half, to)
            for put, half, to in zip((put_shared, put_expert), tree, shardings, strict=True)
        )
    )


def fetch_shared(shared: Tree) -> Tree | None:
    """Copies shared leaves to the host of process 0; returns None on the others."""
    return _fetch(shared, {"shared": (None, 0)}, stacked=False)["shared"]


def fetch_experts(experts: Tree, names: Sequence[str]) -> dict[str, Tree | None]:
    """Copies the tree of each expert to the host of its owner; it is None on the others.

    Args:
      experts: leaves [D or more, ...], on the devices of all processes or on the host.
      names: names of the D experts, in their order.
    """
    leaf = jax.tree.leaves(experts)[0]
    groups, several = [np.array(jax.local_devices()[:1])], len(names) > 1
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
        mesh = sharding.mesh
        groups = list(mesh.devices) if several else [mesh.devices]
    each = leaf.shape[0] // len(groups)
    owners: dict[str, tuple[int | None, int]] = {}
    for i, name in enumerate(names):
        able = sorted({device.process_index for device in groups[i // each].flat})
        owners[name] = i, able[i % each % len(able)]
    return _fetch(experts, owners, stacked=several)


def _fetch(
    tree: Tree, owners: Mapping[str, tuple[int | None, int]], *, stacked: bool
) -> dict[str, Tree | None]:
    """Copies leaf by leaf, so that devices need room for one unsharded leaf at most.

    Args:
      tree: leaves [...] or [D or more, ...].
      owners: index along the leading axis (None: everything) and owner, by name.
      stacked: True if the leading axis is sharded over `domain`.
    """
    leaves, treedef = jax.tree.flatten(tree)
    owned = {name: i for name, (i, owner) in owners.items() if owner == jax.process_index()}
    copies: dict[str, list[np.ndarray]] = {name: [] for name in owned}
    for leaf in leaves:
        unsharded = _unshard(leaf, stacked=stacked)
        for name, index in owned.items():
            copies[name].append(_copy(unsharded, index))
    return {
        name: jax.tree.unflatten(treedef, copies[name]) if name in owned else None
        for name in owners
    }


def _unshard(leaf: Any, *, stacked: bool) -> Any:
    """Gathers a leaf along all mesh axes but `domain`, or along this one too unless `stacked`."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return leaf
    mesh = sharding.mesh
    axes = ("domain",) if stacked and mesh.shape["domain"] > 1 else ()
    target = NamedSharding(mesh, PartitionSpec(*axes), memory_kind=sharding.memory_kind)
    if sharding.is_equivalent_to(target, leaf.ndim):
        return leaf
    if sharding.memory_kind == "pinned_host":
        leaf = jax.device_put(leaf, sharding.with_memory_kind("device"))
        target = target.with_memory_kind("device")
    return _reshard(target)(leaf)


@functools.cache
def _reshard(sharding: NamedSharding) -> Any:
    """Returns a function compiled once for leaves of a shape, not for every checkpoint."""
    return jax.jit(lambda x: x, out_shardings=sharding)


def _copy(leaf: Any, index: int | None) -> np.ndarray:
    """Copies an index of the leading axis that this process has; everything if it is None."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf if index is None else leaf[index])
    for shard in leaf.addressable_shards:
        if index is None:
            return np.array(shard.data)
        held = range(leaf.shape[0])[shard.index[0]]
        if index in held:
            return np.array(np.asarray(shard.data)[held.index(index)])
    raise ValueError(f"no device of process {jax.process_index()} holds expert {index}")
