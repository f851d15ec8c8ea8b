"""The text of programs: XLA's notations, and how often each computation runs."""

import math

import jax
import jax.numpy as jnp
import pytest

from demix_jax.errors import DemixError
from demix_jax.planning.hlo_parser import Array, read_program, replica_groups, source_target_pairs

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


NOTATIONS = [
    ("{{0,1,2,3},{4,5,6,7}}", ROWS),
    ("{{0,4},{1,5},{2,6},{3,7}}", COLUMNS),
    ("{}", (tuple(range(8)),)),
    ("[2,4]<=[8]", ROWS),
    ("[2,4]<=[2,4]", ROWS),
    ("[1,8]<=[8]", (tuple(range(8)),)),
    ("[4,2]<=[2,4]T(1,0)", COLUMNS),
    ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("mesh['x'=2,'y'=4] {'y'}", ROWS),
    ("mesh['x'=2,'y'=4] {'x'}", COLUMNS),
    ("mesh['x'=2,'y'=4,'z'=1] {'x','y','z'}", (tuple(range(8)),)),
    ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    (
        "mesh['x'=2,'y'=2,'z'=2], device_ids=([2,2,2]T(1,0,2)) {'x'}",
        ((0, 2), (1, 3), (4, 6), (5, 7)),
    ),
    ("mesh['x'=2,'y'=4], device_ids=(7,6,5,4,3,2,1,0) {'x'}", COLUMNS),
    ("mesh['x'=8] {'x':(1)2}", COLUMNS),
    ("mesh['x'=8] {'x':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
    ("mesh['x'=8] {'x':(1)2,'x':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("mesh['x'=2,'y'=4] {'x','y':(2)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
]


def test_replica_groups_in_every_notation():
    """XLA's `CollectiveDeviceList`, `IotaReplicaGroupList` and `MeshAxesReplicaGroupList`."""
    for written, groups in NOTATIONS:
        attributes = (
            f", channel_id=1, replica_groups={written}, use_global_device_ids=true, to_apply=%f"
        )
        found = replica_groups(attributes, 8)
        assert {frozenset(group) for group in found} == {frozenset(g) for g in groups}, written
        assert len(found) == len(groups), written


def test_pairs():
    for written, pairs in (
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("source_target_pairs={{0,0},{1,2}}", ((1, 2),)),
        ("source_target_pairs={}", ()),
        ("replica_groups={{0,1}}", None),
    ):
        assert source_target_pairs(f", channel_id=1, {written}, metadata={{}}") == pairs, written


def test_devices_are_partitions_times_replicas():
    entry = "ENTRY %m () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n"
    assert read_program("HloModule m, is_scheduled=true\n\n" + entry).devices == 1
    assert read_program("HloModule m, num_partitions=8\n\n" + entry).devices == 8
    head = "HloModule m, replica_count=2, num_partitions=4\n\n"
    assert read_program(head + entry).devices == 8


def test_bytes_of_types():
    sizes = {"pred": 8, "s4": 4, "f8e4m3fn": 8, "bf16": 16, "f32": 32, "c64": 64, "token": 0}
    for dtype, bits in sizes.items():
        assert Array(dtype, (3,)).bytes == math.ceil(3 * bits / 8), dtype


LINE = """HloModule m, num_partitions=8

ENTRY %main (x: f32[2,3]) -> (f32[2,3], (s32[], bf16[4])) {
  %x = f32[2,3]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="x[\\"a\\"]"}
  %t.1 = (f32[2,3]{1,0}, /*index=1*/(s32[]{:S(2)}, bf16[4]{0})) custom-call(%x, f32[3] %x), n="("
  ROOT %r = f32[2,3]{1,0} get-tuple-element(%t.1), index=1
}
"""


def test_an_instruction_is_taken_apart():
    """Layouts with brackets, nested tuples, comments, operands with their types."""
    main = read_program(LINE).computations["main"]
    assert main["t.1"].arrays == (Array("f32", (2, 3)), Array("s32", ()), Array("bf16", (4,)))
    assert main["t.1"].opcode == "custom-call"
    assert main["t.1"].operands == ("x", "x")
    assert main["x"].op_name == r"x[\"a\"]"
    assert [i.root for i in main.values()] == [False, False, True]
    assert main["r"].element == 1


def test_a_text_that_is_cut_off_is_refused():
    for last in ("%x, f32[3]", "custom-call", "(f32[2,3]{1,0}, /*index=1*/"):
        with pytest.raises(DemixError, match="cut off at"):
            read_program(LINE[: LINE.index(last) + len(last)])


def runs(function, *args) -> dict[str, int | None]:
    """How often the computation that holds each custom name scope runs."""
    text = jax.jit(function).lower(*args).compile().as_text()
    program = read_program(text)
    found = {}
    for computation, times in program.executions.items():
        for instruction in program.computations[computation].values():
            for scope in ("once", "outer", "inner"):
                if f"/{scope}/" in instruction.op_name:
                    found[scope] = times
    return found


def test_nested_loops_multiply():
    def inner(x, _):
        with jax.named_scope("inner"):
            return jnp.sort(x), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, jnp.sin(x), None, length=7)
        with jax.named_scope("outer"):
            return jnp.sort(x)[::-1], None

    def program(x):
        x, _ = jax.lax.scan(outer, x, None, length=5)
        with jax.named_scope("once"):
            return jnp.sort(x) + 1

    assert runs(program, jnp.ones((4, 9))) == {"once": 1, "outer": 5, "inner": 35}


LOOP = """HloModule m

%body (s: (f32[], s32[])) -> (f32[], s32[]) {
  %s = (f32[], s32[]) parameter(0)
  %x = f32[] get-tuple-element(%s), index=0
  %i = s32[] get-tuple-element(%s), index=1
  %by = s32[] constant(STEP)
  %next = s32[] add(%by, %i)
  ROOT %t = (f32[], s32[]) tuple(%x, %next)
}

%condition (s: (f32[], s32[])) -> pred[] {
  %s = (f32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=1
  %end = s32[] constant(END)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[], n: s32[]) -> (f32[], s32[]) {
  %x = f32[] parameter(0)
  %n = s32[] parameter(1)
  %begin = s32[] constant(BEGIN)
  %copy = s32[] copy(%begin)
  %init = (f32[], s32[]) tuple(%x, %copy)
  ROOT %w = (f32[], s32[]) while(%init), condition=%condition, body=%body
}
"""


def loop(begin: int = 0, end: int = 10, step: int = 1, **other: str) -> str:
    text = LOOP.replace("BEGIN", str(begin)).replace("END", str(end)).replace("STEP", str(step))
    for old, new in other.values():
        assert old in text
        text = text.replace(old, new)
    return text


def test_a_counting_loop():
    """Programs for TPUs do not say how long a loop is; compared with counting."""
    for bounds in ((0, 10, 1), (3, 10, 1), (0, 10, 3), (2, 9, 4), (5, 5, 1), (9, 3, 2)):
        program = read_program(loop(*bounds))
        assert program.executions["body"] == len(range(*bounds)), bounds
        assert program.executions["condition"] == len(range(*bounds)) + 1, bounds


def test_another_loop_has_no_known_length():
    for change in (
        ("direction=LT", "direction=NE"),
        ("copy(%begin)", "copy(%n)"),
        ("add(%by, %i)", "multiply(%by, %i)"),
        ("add(%by, %i)", "add(%i, %i)"),
        ("%by = s32[] constant(1)", "%by = s32[] constant(-1)"),
    ):
        program = read_program(loop(change=change))
        assert program.executions["body"] is None, change


def test_a_length_that_the_compiler_states_is_taken():
    stated = 'body=%body, backend_config={"known_trip_count":{"n":"6"}}'
    program = read_program(loop(change=("body=%body", stated)))
    assert program.executions["body"] == 6


def test_attributes_over_several_lines_end_no_computation():
    """As XLA writes what Pallas's kernels are called with."""
    text = """HloModule m, num_partitions=2
ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %call = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={a={
"b":"{}"
}}, metadata={op_name="kernel"}
  ROOT %copy = f32[2]{0} copy(%call)
}
"""
    program = read_program(text)
    assert list(program.computations["main"]) == ["x", "call", "copy"]
    assert program.root("main").name == "copy"
