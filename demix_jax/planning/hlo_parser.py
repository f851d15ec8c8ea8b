"""A parser of compiled programs: computations, instructions, and how often each one runs.

XLA has no public Python interface to the instructions of a compiled program, so its text is read:
what `jax.jit(f).lower(...).compile().as_text()` gives on CPU, GPU and TPU.

    %body (p: (s32[], f32[8])) -> (s32[], f32[8]) {                       a computation
      %sum.1 = f32[8]{0} all-reduce(%x), channel_id=1, ...                an instruction
    }
    ENTRY %main (a: f32[8]) -> f32[8] {                                   the one that runs
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from demix_jax.errors import DemixError

_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*)?\{$")
_END = re.compile(r"\}(,|$)")  # not "}}", the end of attributes over several lines, as Pallas's are
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(\{[^}]*\}|[^\s,{}]+)"
)

_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\}|)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\"?\{(\{[\d,{}]*\}|)\}")

Groups = tuple[tuple[int, ...], ...]


class Array(NamedTuple):
    """The type of one array: `dtype` in XLA's words (f32, bf16, pred, ...), `shape` in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Returns the bytes of the array, rounded up; 0 for tokens."""
        match = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = 8 if self.dtype == "pred" else int(match[1]) if match else 0
        return math.ceil(bits * math.prod(self.shape) / 8)


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: name, unique in the program, without %.
      arrays: arrays of the result, tuples flattened.
      opcode: operation, such as all-reduce-start.
      operands: names of instructions of the same computation.
      attributes: the rest of the line: key=value, metadata={...}, backend_config={...}.
      root: True if it is the result of the computation.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Returns JAX's name scopes, such as jit(step)/transpose(jvp())/ffn/dot_general, or ""."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""

    @property
    def element(self) -> int:
        """Returns the position that a get-tuple-element takes."""
        match = re.search(r"index=(\d+)", self.attributes)
        return int(match[1]) if match else 0

    @property
    def constant(self) -> int | None:
        """Returns the value of an integer constant, else None."""
        if self.opcode == "constant" and re.fullmatch(r"-?\d+", self.operands[0]):
            return int(self.operands[0])
        return None


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: instructions by computation and name, in the order of the text.
      entry: name of the computation that is run.
      devices: number of partitions times replicas.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int

    @functools.cached_property
    def executions(self) -> dict[str, int | None]:
        """Counts how often one run of the program runs each computation, on one device.

        The count is None if a loop's length is not in the program. Every branch of a conditional
        counts as taken. Computations that only define a reduction are left out.
        """
        times: dict[str, int | None] = {self.entry: 1}
        for name in self._callers_first():
            for _, called, factor in self.calls[name]:
                times[called] = _plus(times.get(called, 0), _times(times[name], factor))
        return times

    def _callers_first(self) -> list[str]:
        seen: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in seen:
                for _, called, _ in self.calls[name]:
                    visit(called)
                seen[name] = None

        visit(self.entry)
        return list(seen)[::-1]

    @functools.cached_property
    def calls(self) -> dict[str, list[tuple[Instruction, str, int | None]]]:
        """Lists the instructions of each computation that run others, which, and how often."""
        return {
            name: [(i, *call) for i in inside.values() for call in self._calls(name, i)]
            for name, inside in self.computations.items()
        }

    def _calls(self, name: str, instruction: Instruction) -> list[tuple[str, int | None]]:
        """Lists the computations that an instruction runs, and how often."""
        opcode, calls = instruction.opcode, []
        if opcode.endswith(("-update", "-done")):  # belong to what a -start has begun
            return []
        roles = {
            role: names.strip("{}").replace("%", "").split(",")
            for role, names in _CALLED.findall(instruction.attributes.partition("metadata=")[0])
        }
        for role, names in roles.items():
            if role == "to_apply" and opcode != "call":
                continue
            factor: int | None = 1
            if opcode == "while":
                trips = self._trips(name, instruction)
                factor = trips if role == "body" else _plus(trips, 1)
            calls += [(n.strip(), factor) for n in names if n.strip() in self.computations]
        return calls

    def _trips(self, name: str, loop: Instruction) -> int | None:
        """Counts how often the body of a loop in computation `name` runs; None if unknown.

        Either the compiler says so (`known_trip_count`), or the loop counts from a constant, in
        steps of a constant, while less than a constant.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        called = {role: n.lstrip("%") for role, n in _CALLED.findall(loop.attributes)}
        test = self.root(called["condition"])
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, end = (self._follow(called["condition"], operand) for operand in test.operands)
        if counter is None or counter.opcode != "get-tuple-element":
            return None
        start = self._element(name, loop.operands[0], counter.element)
        body = called["body"]
        following = self._element(body, self.root(body).name, counter.element)
        if following is None or following.opcode != "add":
            return None
        added = (self._follow(body, operand) for operand in following.operands)
        step = next((a for a in added if a and a.constant is not None), None)
        first, last, by = (i.constant if i else None for i in (start, end, step))
        if first is None or last is None or by is None or by < 1:
            return None
        return max(0, math.ceil((last - first) / by))

    def root(self, name: str) -> Instruction:
        """Returns the instruction that is a computation's result."""
        return next(i for i in self.computations[name].values() if i.root)

    def _element(self, name: str, operand: str, index: int) -> Instruction | None:
        """Returns the instruction at `index` of a tuple."""
        made = self._follow(name, operand)
        if made is None or made.opcode != "tuple":
            return None
        return self._follow(name, made.operands[index])

    def _follow(self, name: str, operand: str) -> Instruction | None:
        """Returns the instruction that `operand` is, or is a copy of."""
        instruction = self.computations[name].get(operand)
        while instruction and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computations[name].get(instruction.operands[0])
        return instruction


def read_program(text: str) -> Program:
    """Reads a compiled program; raises DemixError if the text is none."""
    text = re.sub(r"/\*.*?\*/", "", text)
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            inside = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif _END.match(line):
            inside = None
        elif inside is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], root=bool(match[1]))
            inside[instruction.name] = instruction
    if not entry:
        raise DemixError(
            "expected the text of a compiled program, found no ENTRY; pass "
            "jax.jit(...).lower(...).compile().as_text()"
        )
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return Program(computations, entry, math.prod(map(int, counts)))


def _instruction(name: str, rest: str, *, root: bool) -> Instruction:
    """Reads an instruction's `rest`: TYPE OPCODE(OPERANDS), ATTRIBUTES."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    kind, call = rest[:end], rest[end:].lstrip()
    begin = call.find("(")
    end = _closing(call, begin)
    arrays = tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(kind)
    )
    operands = tuple(o.split()[-1].lstrip("%") for o in _split(call[begin + 1 : end - 1]))
    return Instruction(name, arrays, call[:begin], operands, call[end:], root)


def _closing(text: str, begin: int) -> int:
    """Returns the position after the bracket that closes the one at `begin`."""
    depth = 0
    for match in re.finditer(r"[()]", text[begin:] if begin >= 0 else ""):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return begin + match.end()
    raise DemixError(f"the program's text is cut off at {text[:60]!r}; pass all of it")


def _split(text: str) -> list[str]:
    """Splits at the commas that lie in no bracket."""
    parts, depth, last = [], 0, 0
    for match in re.finditer(r"[][(){},]", text):
        if match[0] == "," and not depth:
            parts.append(text[last : match.start()])
            last = match.end()
        elif match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
    return [part for part in (*parts, text[last:]) if part.strip()]


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _times(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a * b


def replica_groups(attributes: str, devices: int) -> Groups:
    """Reads the groups of an instruction, in any of XLA's notations.

    {{0,1},{2,3}} lists them. [4,2]<=[2,4]T(1,0) are 4 groups of 2: 0..7 in shape [2, 4],
    transposed, in rows of two. mesh['a'=2,'b'=4] {'a'} groups along axis a of 0..7 in shape [2, 4];
    device_ids=([4,2]T(1,0)) gives the numbers another order, and 'b':(2)2 is a part of an axis: in
    shape [2, 2, 1] the one of size 2 behind 2. Without any, all `devices` are one group.
    """
    if match := _MESH.search(attributes):
        return _mesh_groups(*match.groups())
    if match := _IOTA.search(attributes):
        shape = _numbers(match[1])
        return _rows(_iota(match[2], match[3]).reshape(-1, shape[-1]))
    if (match := _LISTED.search(attributes)) and match[1]:
        return tuple(tuple(_numbers(group)) for group in match[1][1:-1].split("},{"))
    return (tuple(range(devices)),)


def _mesh_groups(axes: str, order: str | None, along: str) -> Groups:
    """Reads groups along axes of the compiler's own mesh, whose numbers may be reordered."""
    ids = None
    if order:  # as an iota, or listed
        match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
        ids = _iota(match[1], match[2]) if match else np.array(_numbers(order))
    shape: list[int] = []  # of the mesh, its axes split where a part begins or ends
    chosen: list[int] = []
    for item in _items(axes):
        name, _, length = item.rpartition("=")
        size, bounds = int(length), {1, int(length)}
        taken: list[range] = []
        for part in (p for p in _items(along) if p.partition(":")[0] == name):
            match = re.search(r":\((\d+)\)(\d+)", part)
            before, own = (int(match[1]), int(match[2])) if match else (1, size)
            bounds |= {before, before * own}
            taken.append(range(before, before * own))
        for low, high in itertools.pairwise(sorted(bounds)):
            chosen += [len(shape)] if any(low in part for part in taken) else []
            shape.append(high // low)
    ids = np.arange(math.prod(shape)) if ids is None else ids
    rest = [i for i in range(len(shape)) if i not in chosen]
    members = math.prod(shape[i] for i in chosen)
    return _rows(ids.reshape(shape).transpose(rest + chosen).reshape(-1, members))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns the numbers from 0 on in `shape`, transposed by `order`, flat."""
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (numbers.transpose(_numbers(order)) if order else numbers).ravel()


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in groups.tolist())


def _items(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def source_target_pairs(attributes: str) -> tuple[tuple[int, int], ...] | None:
    """Reads (from, to) pairs, except of a device with itself; None if there are none to read."""
    match = _PAIRS.search(attributes)
    if not match:
        return None
    numbers = _numbers(match[1])
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return tuple((a, b) for a, b in pairs if a != b)
