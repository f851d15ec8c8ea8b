"""Parameters and states between the hosts of a job and its devices.

A host reads and writes whole experts, and only such as its devices hold. Of the devices that hold
an expert, those of one process, its owner, bring it to the host that writes it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.model.params import Params, Tree


def local_experts(mesh: Mesh, count: int, padded: int) -> tuple[int, ...]:
    """The experts, of `count` in `padded` places, that devices of this process hold, in order."""
    spec = PartitionSpec("domain") if count > 1 else PartitionSpec()
    places = NamedSharding(mesh, spec).addressable_devices_indices_map((padded,)).values()
    held = {i for index in places if index for i in range(padded)[index[0]]}
    return tuple(sorted(i for i in held if i < count))


def host_to_devices(
    half: Params, here: Sequence[int], count: int, padded: int, shardings: Params
) -> Params:
    """Puts what every process has on its host on the devices of all.

    Args:
      half: parameters or optimizer state on the host, experts' leaves [len(here), ...]; a half
        that is None stays so.
      here: which experts these are.
      count: D.
      padded: places for experts; those from D on are filled with zeros.
      shardings: of the result, whose experts' leaves are [padded, ...].
    """
    own = {expert: i for i, expert in enumerate(here)}

    def expert_part(leaf: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        rows = range(padded)[index[0]]
        empty = np.zeros_like(leaf[0])
        parts = [leaf[own[i]] if i < count else empty for i in rows]
        return np.stack([part[index[1:]] for part in parts])

    def put_expert(leaf: np.ndarray, to: NamedSharding) -> jax.Array:
        shape, part = (padded, *leaf.shape[1:]), functools.partial(expert_part, leaf)
        return jax.make_array_from_callback(shape, to, part)

    def put_shared(leaf: np.ndarray, to: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, to, lambda index: leaf[index])

    return Params(
        None if half.shared is None else jax.tree.map(put_shared, half.shared, shardings.shared),
        None if half.experts is None else jax.tree.map(put_expert, half.experts, shardings.experts),
    )


def fetch_shared(shared: Tree) -> Tree | None:
    """The trunk's tree, copied to the host of process 0; None on the others."""
    return _fetch(shared, {None: (None, 0)}, stacked=False)[None]


def fetch_experts(experts: Tree, names: Sequence[str]) -> dict[str, Tree | None]:
    """The tree of each expert, copied to the host of its owner; None on the others.

    Args:
      experts: leaves [D or more, ...], on the devices of all processes or on the host.
      names: of the D experts.
    """
    leaf = jax.tree.leaves(experts)[0]
    groups, several = [np.array(jax.local_devices()[:1])], len(names) > 1
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
        mesh = sharding.mesh
        groups = list(mesh.devices) if several else [mesh.devices]
    each = leaf.shape[0] // len(groups)
    rows: dict[Any, tuple[int | None, int]] = {}
    for i, name in enumerate(names):
        able = sorted({device.process_index for device in groups[i // each].flat})
        rows[name] = i, able[i % each % len(able)]
    return _fetch(experts, rows, stacked=several)


def _fetch(tree: Tree, rows: dict[Any, tuple[int | None, int]], *, stacked: bool) -> dict[Any, Any]:
    """Copies, one leaf at a time, so that devices need room for one whole leaf at most.

    Args:
      tree: leaves [D or more, ...], or the trunk's.
      rows: of what is asked for by name: the row (None: everything) and its owner.
      stacked: whether rows are cut over `domain`.
    """
    leaves, treedef = jax.tree.flatten(tree)
    own = {name: row for name, (row, owner) in rows.items() if owner == jax.process_index()}
    found: dict[Any, list[np.ndarray]] = {name: [] for name in own}
    for leaf in leaves:
        held = _without_cuts(leaf, stacked=stacked)
        for name, row in own.items():
            found[name].append(_row(held, row))
    return {
        name: jax.tree.unflatten(treedef, found[name]) if name in own else None for name in rows
    }


def _without_cuts(leaf: Any, *, stacked: bool) -> Any:
    """The same numbers, cut over `domain` only, if at all."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return leaf
    mesh = sharding.mesh
    cut = ("domain",) if stacked and mesh.shape["domain"] > 1 else ()
    whole = NamedSharding(mesh, PartitionSpec(*cut), memory_kind=sharding.memory_kind)
    if sharding.is_equivalent_to(whole, leaf.ndim):
        return leaf
    if sharding.memory_kind == "pinned_host":
        leaf = jax.device_put(leaf, sharding.with_memory_kind("device"))
        whole = whole.with_memory_kind("device")
    return _to(whole)(leaf)


@functools.cache
def _to(sharding: NamedSharding) -> Any:
    """Compiled once for leaves of a shape, not for every checkpoint."""
    return jax.jit(lambda x: x, out_shardings=sharding)


def _row(leaf: Any, row: int | None) -> np.ndarray:
    """A copy of a row that this process has; of everything, where `row` is None."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf if row is None else leaf[row])
    for shard in leaf.addressable_shards:
        if row is None:
            return np.array(shard.data)
        rows = range(leaf.shape[0])[shard.index[0]]
        if row in rows:
            return np.array(np.asarray(shard.data)[rows.index(row)])
    raise ValueError(f"no device of process {jax.process_index()} holds row {row}")
