"""Small files of known types: what fits comes back, and what does not is named."""

import dataclasses
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pytest

from demix_jax.errors import DemixError
from demix_jax.typed_files import fits, from_json, read_array, read_arrays, read_json


class Point(NamedTuple):
    x: int
    y: float = 0.5


class Note(TypedDict):
    text: str
    size: NotRequired[int | None]


@dataclasses.dataclass(frozen=True)
class Thing:
    kind: Literal["big", "small"]
    points: tuple[Point, ...] = ()
    pair: tuple[str, int] | None = None
    notes: Mapping[str, Note] = dataclasses.field(default_factory=dict)
    rest: Sequence[Any] | None = None


FIT = [
    ({"kind": "big"}, Thing, Thing("big")),
    ({"kind": "big", "points": [{"x": 1}, {"x": 2, "y": 3}]}, Thing,
     Thing("big", (Point(1), Point(2, 3)))),
    ({"kind": "small", "pair": ["a", 1], "rest": [1, "b", None]}, Thing,
     Thing("small", pair=("a", 1), rest=[1, "b", None])),
    ({"kind": "big", "notes": {"n": {"text": "t", "more": 1}}}, Thing,
     Thing("big", notes={"n": {"text": "t", "more": 1}})),
    ({"text": "t", "size": None}, Note, {"text": "t", "size": None}),
    ({"a": 1, "b": 1.5}, dict[str, float], {"a": 1, "b": 1.5}),
    ([True, False], list[bool], [True, False]),
]  # fmt: skip

UNFIT = [
    ({}, Thing, "'kind' is missing"),
    ([], Thing, r"it is \[\], not an object"),
    ({"kind": "huge"}, Thing, "'kind' is \"huge\", not big or small"),
    ({"kind": ["big"]}, Thing, r"'kind' is \[\"big\"\], not big or small"),
    ({"kind": "big", "kinds": 1}, Thing, "'kinds' is not known to this version"),
    ({"kind": "big", "points": [{"x": 1}, {"y": 1}]}, Thing, r"'points.1.x' is missing"),
    ({"kind": "big", "points": {"x": 1}}, Thing, "'points' is .*, not a list"),
    ({"kind": "big", "pair": ["a"]}, Thing, "'pair' has 1 values, not 2"),
    ({"kind": "big", "pair": [1, 1]}, Thing, "'pair.0' is 1, not text"),
    ({"kind": "big", "notes": {"n": {}}}, Thing, "'notes.n.text' is missing"),
    ({"text": "t", "size": 1.5}, Note, "'size' is 1.5, not a whole number"),
    ({"text": "t", "size": True}, Note, "'size' is true, not a whole number"),
    ({"a": "1"}, dict[str, float], "'a' is \"1\", not a number"),
    ([1], list[bool], "'0' is 1, not true or false"),
    (["x" * 100], list[int], r"'0' is \"x{35} \.\.\., not a whole number"),
]


def test_what_fits_comes_back():
    for value, kind, expected in FIT:
        assert from_json(value, kind) == expected
        assert fits(value, kind)


def test_what_does_not_fit_is_named():
    for value, kind, message in UNFIT:
        with pytest.raises(ValueError, match=message):
            from_json(value, kind)
        assert not fits(value, kind)


def test_a_file_is_named_with_the_way_out(tmp_path: Path):
    path = tmp_path / "note.json"
    with pytest.raises(DemixError, match=r"note.json is missing; get it$"):
        read_json(path, Note, "get it")
    for content, message in (
        (b"", "is damaged: it is empty; get it"),
        (b"\0" * 9, "is damaged: it is empty; get it"),
        (b'{"text"', "is damaged: Expecting ':' delimiter"),
        (b'{"text": "\xff"}', "is damaged: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "is damaged: it is nested too deeply"),
        (b'{"text": 1}', "is damaged: 'text' is 1, not text; get it"),
    ):
        path.write_bytes(content)
        with pytest.raises(DemixError, match=message) as error:
            read_json(path, Note, "get it")
        assert "\n" not in str(error.value)
    path.write_bytes(b'\xef\xbb\xbf{"text": "of an editor"}')
    assert read_json(path, Note, "") == {"text": "of an editor"}
    with pytest.raises(DemixError, match=f"cannot read {tmp_path}: Is a directory; get it"):
        read_json(tmp_path, Note, "get it")


def test_damaged_arrays_are_named(tmp_path: Path):
    path, held = tmp_path / "a.npz", io.BytesIO()
    np.savez_compressed(held, a=np.arange(1000.0), b=np.array(["x", "y"]))
    whole = held.getvalue()
    path.write_bytes(whole)
    assert {k: v.tolist() for k, v in read_arrays(path, "").items()} == {
        "a": list(range(1000)), "b": ["x", "y"]}  # fmt: skip
    bad = bytearray(whole)
    bad[200] ^= 255
    with zipfile.ZipFile(held := io.BytesIO(), "w") as archive:
        archive.writestr("a.npy", b"no array")
    objects = io.BytesIO()
    np.savez(objects, a=np.array([{}], object))
    for content in (b"", b"{}", whole[:-30], whole[:100], bytes(bad), held.getvalue(),
                    objects.getvalue(), np.arange(3).tobytes()):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(DemixError, match=r"a.npz is damaged: .*; make it again$") as error:
            read_arrays(path, "make it again")
        assert "\n" not in str(error.value)
    path = tmp_path / "a.npy"
    np.save(path, np.arange(3))
    assert read_array(path, "").tolist() == [0, 1, 2]
    for content in (b"", path.read_bytes()[:-1], whole):
        path.write_bytes(content)
        with pytest.raises(DemixError, match=r"a.npy is damaged: .*; make it again$"):
            read_array(path, "make it again")
