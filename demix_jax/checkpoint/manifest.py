"""Edits of what a checkpoint says it holds: pure functions from `meta` to `meta`, and averages."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from demix_jax.checkpoint.checkpointer import Meta, check_expert, item_name, items_of
from demix_jax.config.schema import check_names
from demix_jax.errors import DemixError

Hashes = Mapping[str, str]  # content hash by kind: "" the parameters, "optimizer" the moments


def add(
    meta: Meta, name: str, hashes: Hashes, provenance: dict[str, Any], order: Sequence[str] = ()
) -> Meta:
    """With one more expert, the last one.

    Args:
      meta: before.
      name: of the new expert.
      hashes: of its items.
      provenance: where it comes from.
      order: of experts, in which the new one takes its place if it has the others in theirs.

    Raises:
      DemixError: the name is taken or unfit.
    """
    check_new(name, meta["experts"])
    experts = [*meta["experts"], name]
    if [expert for expert in order if expert in meta["experts"]] == meta["experts"]:
        experts = [expert for expert in order if expert in experts]
    items = {item_name(kind, name): value for kind, value in hashes.items()}
    return meta | {
        "experts": experts,
        "hashes": meta["hashes"] | items,
        "provenance": meta["provenance"] | {name: provenance},
    }


def remove(meta: Meta, names: Iterable[str]) -> Meta:
    """Without some experts.

    Raises:
      DemixError: no such expert, one that is named twice, or none would stay.
    """
    gone = list(names)
    for name in gone:
        check_expert(name, meta["experts"], "the checkpoint")
    check_names(tuple(gone))
    if not set(meta["experts"]) - set(gone):
        raise DemixError(
            f"cannot remove {', '.join(gone)}: no expert would be left; a model needs one"
        )
    items = {item for name in gone for item in items_of(name, meta)}
    return meta | {
        "experts": [name for name in meta["experts"] if name not in gone],
        "hashes": {item: value for item, value in meta["hashes"].items() if item not in items},
        "provenance": {n: value for n, value in meta["provenance"].items() if n not in gone},
    }


def rename(meta: Meta, names: Mapping[str, str]) -> Meta:
    """With experts under other names (new by old), in their places, also as parents of others.

    Raises:
      DemixError: no such expert, or a new name that is taken, unfit or given twice.
    """
    items = renamed_items(meta, names)
    provenance = {}
    for name, value in meta["provenance"].items():
        if name in names:
            value = value | {"formerly": [*value.get("formerly", []), name]}
        if isinstance(parent := value.get("parent"), str):
            value = value | {"parent": names.get(parent, parent)}
        elif parent:
            value = value | {"parent": {names.get(n, n): weight for n, weight in parent.items()}}
        provenance[names.get(name, name)] = value
    return meta | {
        "experts": [names.get(name, name) for name in meta["experts"]],
        "hashes": {items.get(item, item): value for item, value in meta["hashes"].items()},
        "provenance": provenance,
    }


def renamed_items(meta: Meta, names: Mapping[str, str]) -> dict[str, str]:
    """New names of the items concerned, by their old names; raises what `rename` raises."""
    for old in names:
        check_expert(old, meta["experts"], "the checkpoint")
    check_names(tuple(names.values()))
    for new in names.values():
        check_new(new, meta["experts"])
    kinds = [(old, item) for old in names for item in items_of(old, meta)]
    return {item: item_name(_kind_of(item), names[old]) for old, item in kinds}


def check_new(name: str, experts: Sequence[str]) -> None:
    """Raises DemixError unless an expert of this name can be added to `experts`."""
    check_names((name,))
    if name in experts:
        raise DemixError(
            f"there is an expert {name!r} already (experts: {', '.join(experts)}); choose another "
            "name, or remove or rename that one"
        )


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises DemixError unless weights are numbers from 0 to 1 that sum to one."""
    total = math.fsum(weights.values())
    if not all(0 <= w <= 1 for w in weights.values()) or not abs(total - 1) < 1e-6:
        given = ",".join(f"{name}={value:g}" for name, value in weights.items())
        raise DemixError(f"weights {given} sum to {total:g}; they must be in [0, 1] and sum to 1")


def average(parts: Iterable[tuple[float, np.ndarray]]) -> np.ndarray:
    """Weighted sum of equally shaped arrays, taken one at a time; float64 inside, float32 out."""
    products = (weight * leaf.astype(np.float64) for weight, leaf in parts)
    return functools.reduce(np.add, products).astype(np.float32)


def descendants(name: str, meta: Meta) -> list[str]:
    """Experts that were started from `name`, directly or not; also by averaging."""
    found: list[str] = []
    ancestors = [name]
    while ancestors:
        ancestor = ancestors.pop()
        for expert, value in meta["provenance"].items():
            parent = value.get("parent") or ()
            parents = (parent,) if isinstance(parent, str) else tuple(parent)
            if ancestor in parents and expert not in (name, *found):
                found.append(expert)
                ancestors.append(expert)
    return found


def _kind_of(item: str) -> str:
    kind = item.partition(".")[0]
    return "" if kind == "expert" else kind
