"""Collectives of a compiled program: the arrays that devices exchange, their bytes and mesh axes.

`collectives` reads the text of a compiled program, `classify` says whether shared or expert
parameters are what moves, `forbidden_collectives` what must not be. Arrays that travel together
are told apart.

Bytes are those of ring algorithms, which send the least that is possible over n devices holding S
bytes each (for an all-gather S is the gathered array): all-reduce 2 S (n - 1) / n, all-gather,
reduce-scatter, all-to-all and collective-broadcast S (n - 1) / n, collective-permute S.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from demix_jax.errors import DemixError
from demix_jax.model.params import Params
from demix_jax.model.transformer import layer_axes
from demix_jax.parallel.layout import dim_axes
from demix_jax.planning.hlo_parser import (
    Array,
    Groups,
    Instruction,
    Program,
    read_program,
    replica_groups,
    source_target_pairs,
)

SHARED, EXPERT, OTHER = "shared", "expert", "other"

_KIND = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast|send)(-start)?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all, ragged-all-to-all,
        collective-permute, collective-broadcast or send.
      name: name of the instruction, the same for arrays that travel together.
      dtype: type of the array, in XLA's words.
      shape: shape of the operand on one device; for an all-gather, of the result.
      payload: bytes of that array.
      groups: positions in `mesh.devices.flat` that exchange with each other.
      axes: the fewest mesh axes along which the devices of a group lie, in the mesh's order.
      op_name: JAX's name scopes at the place where the array was made.
      times: executions in one run of the program; None if a loop's length is not known.
      part: "shared", "expert" or "other"; "" before `classify`.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    payload: int
    groups: Groups
    axes: tuple[str, ...]
    op_name: str
    times: int | None
    part: str = ""

    def __str__(self) -> str:
        scopes = f" ({self.op_name})" if self.op_name else ""
        array = f"{self.part} {self.dtype}{list(self.shape)}".lstrip()
        return f"{array}, {self.kind} {self.name} over {' x '.join(self.axes)}{scopes}"

    @property
    def elements(self) -> int:
        """Returns the number of elements of the array."""
        return math.prod(self.shape)

    @property
    def sent(self) -> float:
        """Returns the bytes that a device of the largest group sends in one execution."""
        return ring_bytes(self.kind, self.payload, max(map(len, self.groups), default=1))

    @property
    def sent_per_run(self) -> float:
        """Returns the bytes sent in a run of the program; raises DemixError if `times` is None."""
        if self.times is None:
            raise DemixError(
                f"{self.kind} {self.name} runs in a loop whose length the program does not say; "
                "loops must count to a constant for their traffic to be known"
            )
        return self.times * self.sent


def ring_bytes(kind: str, payload: float, devices: int) -> float:
    """Returns the bytes each of `devices` sends for an array of `payload` bytes, in a ring."""
    if kind in ("collective-permute", "send"):
        return payload if devices > 1 else 0.0
    once = payload * (devices - 1) / devices
    return 2 * once if kind == "all-reduce" else once


def collectives(compiled_text: str, mesh: Mesh) -> list[Collective]:
    """Lists every array that the devices of `mesh` exchange in a compiled program, callers first.

    An asynchronous collective counts once, where it starts; an all-reduce of which each device
    keeps a part (a fusion of XLA's TPU compiler) is a reduce-scatter.

    Args:
      compiled_text: `jax.jit(...).lower(...).compile().as_text()`.
      mesh: mesh of the program's shardings. Programs number devices by their position in this
        mesh, whatever ids the devices have.

    Raises:
      DemixError: the text is no program, or one for another number of devices.
    """
    program = read_program(compiled_text)
    if program.devices != mesh.size:
        raise DemixError(
            f"the program is for {program.devices} devices, the mesh {dict(mesh.shape)} has "
            f"{mesh.size}; pass the mesh that it was compiled for"
        )
    arrays: list[Collective] = []
    fused: set[tuple[str, str]] = set()
    callers = {
        called: (name, instruction)
        for name in program.executions
        for instruction, called, _ in program.calls[name]
        if instruction.opcode == "fusion"
    }
    for computation, times in program.executions.items():
        caller, call = callers.get(computation, ("", None))
        for instruction in program.computations[computation].values():
            if not _KIND.fullmatch(instruction.opcode):
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if call and channel:  # overlapped on TPU: several fusions carry the same collective
                if (caller, channel[1]) in fused:
                    continue
                fused.add((caller, channel[1]))
            arrays += _operands(program, computation, instruction, call, times, mesh)
    return arrays


def _operands(
    program: Program,
    computation: str,
    instruction: Instruction,
    call: Instruction | None,
    times: int | None,
    mesh: Mesh,
) -> Iterator[Collective]:
    """Yields the arrays of one instruction."""
    inside = program.computations[computation]
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and call and _keeps_a_slice(program, computation, instruction):
        kind = "reduce-scatter"
    pairs = source_target_pairs(instruction.attributes)
    groups = replica_groups(instruction.attributes, mesh.size) if pairs is None else _chains(pairs)
    if kind == "send" and pairs is None:  # to the host
        return
    axes = group_axes(groups, mesh)
    names = _op_names(inside, instruction)
    arrays = [array for name in instruction.operands for array in inside[name].arrays]
    if kind in ("ragged-all-to-all", "send"):  # further operands say where to put it
        arrays = arrays[:1]
    for i, array in enumerate(arrays):
        if kind == "all-gather":
            array = _gathered(array, instruction, len(groups[0]))
        scopes = names.get(i) or instruction.op_name or (call.op_name if call else "")
        yield Collective(
            kind=kind,
            name=instruction.name,
            dtype=array.dtype,
            shape=array.shape,
            payload=array.bytes,
            groups=groups,
            axes=axes,
            op_name=scopes,
            times=times,
        )


def _keeps_a_slice(program: Program, computation: str, reduced: Instruction) -> bool:
    """Returns True if a computation returns a slice of what was reduced."""
    last = program.root(computation)
    while last.opcode in ("bitcast", "copy", "convert", "reshape"):
        last = program.computations[computation][last.operands[0]]
    return last.opcode == "dynamic-slice" and last.operands[0] == reduced.name


def _gathered(array: Array, instruction: Instruction, devices: int) -> Array:
    """Returns the result of an all-gather of `array`."""
    dimension = re.search(r"dimensions=\{(\d+)\}", instruction.attributes)
    shape = list(array.shape)
    shape[int(dimension[1]) if dimension else 0] *= devices
    return Array(array.dtype, tuple(shape))


def _op_names(inside: dict[str, Instruction], instruction: Instruction) -> dict[int, str]:
    """Returns the name scopes of each of several arrays that travel together, by position.

    They are kept by the instruction that takes an array out of the tuple; else the compiler may
    have joined them, a/b/(c:d/e:f).
    """
    if len(instruction.operands) == 1:
        return {}
    before, _, joined = instruction.op_name.partition("/(")
    parts = joined.removesuffix(")").split(":")
    names = {i: f"{before}/{part}" for i, part in enumerate(parts)}
    names = names if len(parts) == len(instruction.operands) else {}
    done = {instruction.name}
    done |= {i.name for i in inside.values() if instruction.name in i.operands[:1] and _done(i)}
    taken = (i for i in inside.values() if i.opcode == "get-tuple-element")
    return names | {i.element: i.op_name for i in taken if i.operands[0] in done and i.op_name}


def _done(instruction: Instruction) -> bool:
    return instruction.opcode.endswith("-done")


def _chains(pairs: Sequence[tuple[int, int]]) -> Groups:
    """Returns the groups of devices that pairs connect."""
    group = {device: {device} for pair in pairs for device in pair}
    for a, b in pairs:
        joined = group[a] | group[b]
        group.update(dict.fromkeys(joined, joined))
    return tuple(sorted({tuple(sorted(members)) for members in group.values()}))


def group_axes(groups: Groups, mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes along which devices of a group differ.

    Raises:
      DemixError: groups name devices that the mesh does not have.
    """
    last = max((device for group in groups for device in group), default=0)
    if last >= mesh.size:
        raise DemixError(
            f"the program exchanges with device {last}, the mesh {dict(mesh.shape)} has "
            f"{mesh.size} devices; pass the mesh that it was compiled for"
        )
    differ: set[int] = set()
    for group in groups:
        coordinates = np.stack(np.unravel_index(list(group), mesh.devices.shape))  # [axes, devices]
        differ |= set(np.flatnonzero((coordinates != coordinates[:, :1]).any(1)).tolist())
    return tuple(mesh.axis_names[i] for i in sorted(differ))


def classify(arrays: Sequence[Collective], params: Params, mesh: Mesh) -> list[Collective]:
    """Returns collectives with `part` set: shared parameters, expert parameters, or other arrays.

    An array is of parameters if it has the size of a leaf, whole or sharded along some of the axes
    of its sharding, of all layers or one, and its name scopes do not contradict. Sizes decide where
    only one half of the parameters has a leaf of that size; where both do, scopes that only the
    shared half has, then the exact shape, then scopes that only the experts have. What none of this
    decides is "other", as are counts, norms, and the activations that `mesh.model` sums. An
    activation of just the size of a leaf passes for it: compare total bytes with those of the
    gradients too.

    Args:
      arrays: collectives of one program.
      params: shapes; leaves with a `sharding` have it, others are replicated if shared and sharded
        over `domain` if not.
      mesh: mesh of the program.
    """
    shapes = _leaf_shapes(params, mesh)
    scopes = _scopes(params)
    return [dataclasses.replace(c, part=_part(c, shapes, scopes)) for c in arrays]


def _part(
    collective: Collective, shapes: dict[str, set[tuple[int, ...]]], scopes: dict[str, set[str]]
) -> str:
    if not _is_float(collective):
        return OTHER
    sized = [part for part, of in shapes.items() if collective.elements in map(math.prod, of)]
    words = set(re.findall(r"\w+", collective.op_name))
    named = [part for part in scopes if words & scopes[part]]
    scope = named[0] if len(named) == 1 else ""  # names of several arrays may be joined
    if len(sized) < 2 or scope == SHARED:
        return sized[0] if sized and (scope, sized[0]) != (SHARED, EXPERT) else OTHER
    exact = [part for part, of in shapes.items() if collective.shape in of]
    if len(exact) == 1:
        return exact[0]
    return EXPERT if scope == EXPERT else OTHER


def _scopes(params: Params) -> dict[str, set[str]]:
    """Returns the name scopes of each half: its own, and modules whose leaves are all of it.

    The logits are made with the embedding, so they go with it.
    """
    names = [
        {key.key for path, _ in jax.tree.leaves_with_path(half) for key in path} for half in params
    ]
    own = {SHARED: names[0] - names[1] | {SHARED}, EXPERT: names[1] - names[0] | {EXPERT}}
    return {part: of | ({"logprobs"} if "embed" in of else set()) for part, of in own.items()}


def _leaf_shapes(params: Params, mesh: Mesh) -> dict[str, set[tuple[int, ...]]]:
    """Returns the shapes that leaves may travel in, by part.

    They are sharded in every way, of all layers or one; experts' of one expert, a device's or all.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {SHARED: set(), EXPERT: set()}
    for stacked, (part, half) in enumerate(zip(shapes, params, strict=True)):
        for path, leaf in jax.tree.leaves_with_path(half):
            layers = _layer_axes(path)
            experts = {(n,) for n in (1, *_held(leaf, mesh)[:1], leaf.shape[0])}
            for shape in _sharded_shapes(leaf):
                whole, layer = shape[stacked:], shape[stacked + layers :]
                for first in experts if stacked else {()}:
                    shapes[part] |= {(*first, *whole), (*first, *layer)}
                    if stacked and layers:
                        shapes[part].add((1, *first, *layer))
    return shapes


def _layer_axes(path: Any) -> int:
    return layer_axes([key.key for key in path])


def _sharded_shapes(leaf: jax.ShapeDtypeStruct) -> set[tuple[int, ...]]:
    """Returns the shapes of a leaf: whole, on one device, and gathered along some axes."""
    shapes = {leaf.shape}
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return shapes
    for dimension, axes in enumerate(dim_axes(sharding.spec)):
        for size in (sharding.mesh.shape[axis] for axis in axes):
            shapes |= {
                (*shape[:dimension], shape[dimension] // size, *shape[dimension + 1 :])
                for shape in shapes
            }
    return shapes


def _held(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> tuple[int, ...]:
    """Returns the shape of an experts' leaf on one device."""
    if sharding := getattr(leaf, "sharding", None):
        return sharding.shard_shape(leaf.shape)
    groups = mesh.shape.get("domain", 1) if leaf.shape[0] > 1 else 1
    return leaf.shape[0] // groups, *leaf.shape[1:]


def forbidden_collectives(arrays: Sequence[Collective], params: Params, mesh: Mesh) -> list[str]:
    """Lists what breaks the promise that experts never leave their group, a line for each.

    An all-to-all of any kind is forbidden; and, with more than one expert, an array along `domain`
    that is of expert parameters, or of an unknown part and a floating-point type, has more numbers
    than there are experts (sums for each of them do cross) and no fewer than the least that a
    device holds of one layer of one expert.

    Args:
      arrays: collectives of one program, with `part` set.
      params: shapes as for `classify`.
      mesh: mesh of the program.
    """
    leaves = jax.tree.leaves_with_path(params.experts)
    experts = leaves[0][1].shape[0]
    sizes = [math.prod(_held(leaf, mesh)[1 + _layer_axes(path) :]) for path, leaf in leaves]
    smallest = max(experts + 1, min(sizes))
    lines = []
    for c in arrays:
        crosses = experts > 1 and "domain" in c.axes and c.elements >= smallest
        suspect = c.part == EXPERT or (c.part == OTHER and _is_float(c))
        if c.kind.endswith("all-to-all"):
            lines.append(f"all-to-all of {c}")
        elif crosses and suspect:
            lines.append(f"crosses domain: {c}")
    return lines


def _is_float(collective: Collective) -> bool:
    return bool(re.match(r"b?f\d", collective.dtype))


def bytes_by_part(arrays: Iterable[Any]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Sums the bytes that a device sends in one run of a program, by part and mesh axes.

    Args:
      arrays: each a `Collective`, or a `CollectiveCost` of `communication.py`.
    """
    totals: dict[tuple[str, tuple[str, ...]], float] = {}
    for c in arrays:
        totals[c.part, c.axes] = totals.get((c.part, c.axes), 0.0) + c.sent_per_run
    return totals
