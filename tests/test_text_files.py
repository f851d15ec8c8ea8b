"""Text in files: what is read from them, in whatever ranges, and what is wrong with them."""

import bz2
import functools
import gzip
import itertools
import json
import lzma
import os
import pickle
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard
from bucket import Bucket
from cases import case, folders

from demix_jax.data.sources.base import BadRecords, Document, Part, Selection
from demix_jax.data.sources.listing import find_files
from demix_jax.data.sources.text_files import JsonLines, TextFiles, read_jsonl
from demix_jax.errors import DemixError

COMPRESSIONS = [".gz", ".zst", ".bz2", ".xz"]
ENDINGS = ["jsonl", *(f"jsonl{ending}" for ending in COMPRESSIONS)]
ROWS: list[dict[str, Any]] = [
    {"text": "plain words", "id": "first", "split": "train"},
    {"text": "line\nbreak\r\n\ttab  \n", "id": "second", "split": "valid"},
    {"text": "no id", "split": "test"},
    {"text": "no split 👍🏽 é e\u0301 漢 \u2028 \0", "id": 4},
    {"text": "other names", "id": "e", "split": "validation", "more": [1, {"a": None}]},
    {"text": "", "id": "empty", "split": "dev"},
    {"text": "last", "id": None, "split": "val"},
]


def expected_documents(file: str) -> list[Document]:
    starts = [sum(len(json.dumps(row)) + 1 for row in ROWS[:i]) for i in range(len(ROWS))]
    return [
        Document("plain words", "first", "train"),
        Document("line\nbreak\r\n\ttab  \n", "second", "valid"),
        Document("no id", f"{file}@{starts[2]}", "test"),
        Document("no split 👍🏽 é e\u0301 漢 \u2028 \0", "4", None),
        Document("other names", "e", "valid"),
        Document("", "empty", "valid"),
        Document("last", f"{file}@{starts[6]}", "valid"),
    ]


def compress(data: bytes, ending: str) -> bytes:
    if ending.endswith("gz"):
        return gzip.compress(data, mtime=0)
    if ending.endswith("bz2"):
        return bz2.compress(data)
    if ending.endswith("xz"):
        return lzma.compress(data)
    if ending.endswith("zst"):
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return data


def write_lines(path: Path, lines: Iterable[str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(compress(b"".join(line + b"\n" for line in raw), path.name))
    return path


def write_texts(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def read(place: Path | str, allowed: int = 0, **settings: Any) -> list[Document]:
    broken = BadRecords(allowed)
    return read_parts(TextFiles(str(place), **settings).parts(), broken)


def read_parts(parts: Iterable[Part], broken: BadRecords) -> list[Document]:
    return [document for part in parts for document in part.documents(broken)]


def numbered(count: int) -> list[str]:
    return [json.dumps({"text": f"document {i}"}) for i in range(count)]


def test_json_lines_are_read(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for ending in ENDINGS:
        with case(ending):
            folder = next(fresh)
            path = write_lines(folder / f"law.{ending}", map(json.dumps, ROWS))
            assert read(path) == expected_documents(f"law.{ending}")
            assert list(read_jsonl(str(path))) == expected_documents(f"law.{ending}")


@pytest.mark.slow
def test_many_json_lines_are_read_in_order(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for ending in ENDINGS:
        with case(ending):
            folder = next(fresh)
            path = write_lines(folder / f"law.{ending}", numbered(20_000))
            assert [d.text for d in read(path)] == [f"document {i}" for i in range(20_000)]


def test_unescaped_unicode_and_blank_lines_and_no_last_newline_are_fine(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_bytes('\n{"text": "é 👍"}\r\n   \n{"text": "b"}'.encode())
    assert read(tmp_path / "law.jsonl") == [
        Document("é 👍", "law.jsonl@1"),
        Document("b", "law.jsonl@26"),
    ]


def test_archives_joined_end_to_end_are_read_whole(tmp_path: Path) -> None:
    for ending in ENDINGS[1:]:
        halves = [compress(f'{{"text": "{half}"}}\n'.encode(), ending) for half in "ab"]
        (tmp_path / f"x.{ending}").write_bytes(b"".join(halves))
        assert [d.text for d in read(tmp_path / f"x.{ending}")] == ["a", "b"]


def test_reading_can_stop_early(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", [*numbered(3), "{"])
    documents = read_jsonl(str(tmp_path / "law.jsonl"))
    assert [next(documents).text for _ in range(3)] == [f"document {i}" for i in range(3)]


def test_text_folder_without_splits_is_read(tmp_path: Path) -> None:
    write_texts(tmp_path, {"b.txt": "B\r\n", "a.md": " A 👍", "deep/er/c": "C", "e": ""})
    assert read(tmp_path) == [
        Document(" A 👍", "a.md"),
        Document("B\r\n", "b.txt"),
        Document("C", "deep/er/c"),
    ]


def test_text_folder_with_splits_is_read(tmp_path: Path) -> None:
    write_texts(
        tmp_path,
        {"train/x/a.txt": "A", "valid/b.txt": "B", "test/c.txt": "C", "dev/d.txt": "D", "e": "E"},
    )
    assert set(read(tmp_path)) == {
        Document("A", "train/x/a.txt", "train"),
        Document("B", "valid/b.txt", "valid"),
        Document("C", "test/c.txt", "test"),
        Document("D", "dev/d.txt", "valid"),
        Document("E", "e", None),
    }


def test_file_called_like_a_split_has_no_split(tmp_path: Path) -> None:
    write_texts(tmp_path, {"train": "A", "x/valid/b": "B"})
    assert {document.split for document in read(tmp_path)} == {None}


def test_folder_of_json_lines_has_splits_from_rows_or_else_from_folders(tmp_path: Path) -> None:
    row = '{"text": "own", "split": "test"}'
    write_lines(tmp_path / "law" / "valid" / "a.jsonl.gz", ['{"text": "A"}', row])
    write_lines(tmp_path / "law" / "train" / "x" / "b.jsonl.zst", ['{"text": "B"}'])
    write_lines(tmp_path / "law" / "c.jsonl", ['{"text": "C"}'])
    assert read(tmp_path / "law") == [
        Document("C", "c.jsonl@0", None),
        Document("B", "train/x/b.jsonl.zst@0", "train"),
        Document("A", "valid/a.jsonl.gz@0", "valid"),
        Document("own", "valid/a.jsonl.gz@14", "test"),
    ]


# What lies in a domain's folder beside a.jsonl and a.txt: left out, or named and refused.
LITTER = [
    "README.md",
    "readme",
    "Readme_en.txt",
    "LICENSE",
    "licence.txt",
    "CITATION.cff",
    "SHA256SUMS",
    "checksums.txt",
    "a.jsonl.sha256",
    "a.jsonl.md5",
    "a.jsonl.bak",
    "a.jsonl~",
    "#a.txt#",
    "a.txt.orig",
    "a.jsonl:Zone.Identifier",
    "_SUCCESS",
    "_committed_42",
    "Thumbs.db",
    "desktop.ini",
    "__MACOSX/a.jsonl",
    "__pycache__/a.pyc",
    "train/_SUCCESS",
    "README.json",
]
HIDDEN = [".DS_Store", "._a.jsonl", ".a.jsonl.crc", ".git/config", ".ipynb_checkpoints/a.jsonl"]
REFUSED = {
    "dataset_info.json": "dataset_info.json, which can be JSON lines or a description",
    "a.jsonl.part": r"a.jsonl.part, whose name does not end like JSON lines",
    "a.jsonl.lz4": r"a.jsonl.lz4, whose name does not end like JSON lines",
    "a.jsonl-00001-of-00002": "whose name does not end like JSON lines",
    "b.txt.tmp": "b.txt.tmp, which looks like an unfinished copy",
    "b.parquet": r"has files of .*b\.parquet",
    "b.orc": "b.orc, which is no text",
    "b.tar.gz": "b.tar.gz, which is no text",
    "b.zip": "b.zip, which is no text",
}
OTHERS = ["notes.txt", "stats.csv", "DONE", "card.yaml", "train/b.md", "b.txt.gz"]


def test_what_lies_beside_data_is_left_out_or_refused(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    row = '{"text": "A"}\n'
    for data, beside in itertools.product(("a.jsonl", "a.txt"), (*LITTER, *HIDDEN)):
        with case(data, beside):
            folder = write_texts(next(fresh), {data: row, beside: row})
            assert [d.text for d in read(folder)] == ["A" if data == "a.jsonl" else row]
            source = TextFiles(str(folder))
            assert source.left_out() == ([] if beside in HIDDEN else [beside])
    for data, (beside, message) in itertools.product(("a.jsonl", "a.txt"), REFUSED.items()):
        with case(data, beside):
            folder = write_texts(next(fresh), {data: row, beside: row})
            with pytest.raises(DemixError, match=message):
                read(folder)
    for name, ending in itertools.product(("a.jsonl", "a.txt"), COMPRESSIONS):
        with case(name, ending):
            folder = write_texts(next(fresh), {name: row, name + ending: compress(b"", ending)})
            with pytest.raises(DemixError, match=rf"{name} and {name}{ending}, which seem to be"):
                read(folder)
    for beside in OTHERS:
        with case(beside):
            folder = write_texts(next(fresh), {"a.jsonl": row, beside: compress(b"B", beside)})
            with pytest.raises(DemixError, match=rf"JSON lines \(a.jsonl\) and others \({beside}"):
                read(folder)
            assert [d.text for d in read(f"{folder}/**/*.jsonl")] == ["A"]
            (folder / beside).write_bytes(b"")  # a marker
            assert [d.text for d in read(folder)] == ["A"]
            assert TextFiles(str(folder)).left_out() == [beside]


def test_file_is_read_if_the_place_is_its_name(tmp_path: Path) -> None:
    write_texts(tmp_path, {"README.md": "A", "x/README.md": "B", "x/b.txt": "C", "y.json": '"D"'})
    assert [d.text for d in read(tmp_path / "README.md")] == ["A"]
    assert [d.text for d in read(f"{tmp_path}/*/README.md")] == ["B"]
    assert [d.text for d in read(f"{tmp_path}/x/*")] == ["C"]
    (tmp_path / "y.json").write_text('{"text": "D"}\n')
    for place in ("y.json", "*.json"):
        assert [d.text for d in read(f"{tmp_path}/{place}")] == ["D"]
    (tmp_path / "x" / "b.txt").unlink()
    with pytest.raises(DemixError, match=r"x has no files but README.md"):
        read(tmp_path / "x")


def test_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path, {"a.jsonl": '{"text": "A"}\n'})
    (tmp_path / "folder").symlink_to(tmp_path)
    assert TextFiles(str(tmp_path)).left_out() == ["folder"]
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "annexed")
    with pytest.raises(DemixError, match="cannot be listed: .*b.jsonl"):
        read(tmp_path)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    mark = "\ufeff"
    for kind, ending in itertools.product(("jsonl", "txt", "csv"), ("", *COMPRESSIONS)):
        with case(kind, ending):
            lines = [json.dumps({"text": text}) + "\n" for text in ("a", "b" + mark)]
            # As joined from two files that each had one.
            content = mark + mark.join(lines) if kind == "jsonl" else mark + "a,b" + mark + "\n"
            path = next(fresh) / f"x.{kind}{ending}"
            path.write_bytes(compress(content.encode(), path.name))
            wanted = ["a", "b" + mark] if kind == "jsonl" else ["a,b" + mark + "\n"]
            assert [d.text for d in read(path)] == wanted


def test_name_of_a_file_need_not_be_utf8(tmp_path: Path) -> None:
    for ending, content in {"jsonl": '{"text": "a"}\n', "txt": "a"}.items():
        with case(ending):
            folder = tmp_path / ending
            folder.mkdir()
            (folder / os.fsdecode(b"\xff." + ending.encode())).write_text(content)
            assert [d.text for d in read(folder)] == ["a"]


def test_other_encodings_are_named(tmp_path: Path) -> None:
    for encoding, ending in itertools.product(("UTF-16", "UTF-32"), ("jsonl", "txt", "txt.gz")):
        with case(encoding, ending):
            path = tmp_path / f"{encoding}.{ending}"
            path.write_bytes(compress('{"text": "a"}\n'.encode(encoding), path.name))
            with pytest.raises(
                DemixError, match=rf"(:1|txt|gz): {encoding}, not UTF-8; convert it: iconv"
            ):
                read(path)


class Written(NamedTuple):
    """A file of random lines, and what was put into it."""

    path: Path
    documents: list[Document]
    starts: list[int]  # the byte at which each document's line begins
    bad: list[int]  # numbers of broken lines


def write_random(path: Path, seed: int) -> Written:
    """Blank, short, long, unicode and broken lines, with any line ending and perhaps no last."""
    rng = random.Random(seed)
    data, documents, starts, bad = b"", [], [], []
    lines = rng.randrange(40)
    for number in range(1, lines + 1):
        kind = rng.choice(["blank", "bad", "short", "short", "unicode", "long"])
        if kind == "blank":
            line = rng.choice(["", "  \t", "\r"])
        elif kind == "bad":
            line = rng.choice(["{", '{"no": 1}', '{"text": "\\ud800"}', "é"])
            bad.append(number)
        else:
            size = {"short": 5, "unicode": 9, "long": 600}[kind]
            alphabet = 'ab\n\\"' if kind != "unicode" else "é漢👍🏽\u2028\x85\x1c\r"
            text = "".join(rng.choices(alphabet, k=rng.randrange(size)))
            line = json.dumps({"text": text}, ensure_ascii=rng.random() < 0.3)
            documents.append(Document(text, f"{path.name}@{len(data)}"))
            starts.append(len(data))
        data += line.encode() + rng.choice([b"\n", b"\n", b"\r\n"])
    path.write_bytes(data.removesuffix(b"\n") if rng.random() < 0.5 else data)
    return Written(path, documents, starts, bad)


def check_ranges(written: Written, cuts: list[int]) -> None:
    """Every range holds the documents whose lines begin in it, and knows which lines are broken."""
    (file,) = find_files(str(written.path))
    broken = BadRecords(1000)
    for start, end in zip(cuts, cuts[1:], strict=False):
        part = pickle.loads(pickle.dumps(JsonLines(file, Selection(), start, end)))
        pairs = zip(written.starts, written.documents, strict=True)
        assert part.size == end - start
        assert list(part.documents(broken)) == [d for s, d in pairs if start <= s < end]
    numbers = [int(place.removeprefix(f"{file.place}:").split(":")[0]) for place in broken.messages]
    assert numbers == written.bad


def test_any_ranges_hold_the_same_documents_as_one(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for seed in range(30):
        with case(seed):
            folder = next(fresh)
            written = write_random(folder / "law.jsonl", seed)
            size, rng = written.path.stat().st_size, random.Random(seed)
            check_ranges(written, [0, size])
            for _ in range(8):
                inner = rng.sample(range(size + 1), min(size, rng.randrange(30)))
                check_ranges(written, [0, *sorted(inner), size])


@pytest.mark.slow
def test_ranges_of_one_byte_hold_the_same_documents_as_one(tmp_path: Path) -> None:
    sizes = set()
    for seed in range(30, 36):
        written = write_random(tmp_path / "law.jsonl", seed)
        size = written.path.stat().st_size
        check_ranges(written, list(range(size + 1)))
        sizes.add(size)
    assert max(sizes) > 1000


def test_parts_of_any_size_hold_the_same_documents(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for place in ["disk", "bucket"]:
        for part_bytes in [1, 2, 7, 100, 1 << 26]:
            with case(place, part_bytes):
                folder = next(fresh)
                documents: list[Document] = []
                for seed in range(12):
                    written = write_random(folder / f"{seed:02}.jsonl", seed)
                    documents += written.documents
                    Bucket.objects[f"{folder.name}/{seed:02}.jsonl"] = written.path.read_bytes()
                address = str(folder) if place == "disk" else f"bucket://{folder.name}"
                parts = TextFiles(address, part_bytes=part_bytes).parts()
                total = sum(path.stat().st_size for path in folder.iterdir())
                assert sum(part.size for part in parts) == total
                assert len(parts) == 1 if part_bytes > total else len(parts) > 30
                broken = BadRecords(1000)
                found = read_parts(pickle.loads(pickle.dumps(parts)), broken)
                assert found == documents
                assert broken.messages


def test_line_numbers_are_right_behind_many_blocks(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * (i % 997)}) for i in range(8000)]
    lines[7000] = lines[7500] = "{"
    path = write_lines(tmp_path / "law.jsonl", lines)
    assert path.stat().st_size > 3 << 20
    for part_bytes in (1 << 20, 1 << 26):
        broken = BadRecords(2)
        read_parts(TextFiles(str(path), part_bytes=part_bytes).parts(), broken)
        assert [place.split(":")[1] for place in broken.messages] == ["7001", "7501"]


def test_many_small_files_are_few_parts(tmp_path: Path) -> None:
    for i in range(1500):
        (tmp_path / f"{i:04}.jsonl").write_text(f'{{"text": "{i}"}}\n' * 3)
    parts = TextFiles(str(tmp_path), part_bytes=1).parts()
    assert 100 < len(parts) <= 512
    texts = [document.text for document in read_parts(parts, BadRecords())]
    assert texts == [str(i) for i in range(1500) for _ in range(3)]


def test_parts_of_plain_text_are_files_in_a_row(tmp_path: Path) -> None:
    write_texts(tmp_path, {f"{i:02}.txt": "x" * 10 for i in range(25)})
    parts = TextFiles(str(tmp_path), part_bytes=35).parts()
    assert [part.size for part in parts] == [40] * 6 + [10]
    assert [d.id for d in read_parts(parts, BadRecords())] == [f"{i:02}.txt" for i in range(25)]


def rows_of(place: Path, *, field: str = "text", **where: str) -> list[str]:
    conditions = tuple((key.replace("_", "/"), tuple(v.split("|"))) for key, v in where.items())
    return [document.text for document in read(place, selection=Selection(field, conditions))]


def test_text_of_another_field_is_read(tmp_path: Path) -> None:
    rows = [{"body": "A", "text": 3}, {"body": "B", "a": {"b": {"c": "C"}}}]
    path = write_lines(tmp_path / "law.jsonl", map(json.dumps, rows))
    assert rows_of(path, field="body") == ["A", "B"]
    with pytest.raises(DemixError, match=r":1: .* string field 'a/b/c' \(its fields: body, text\)"):
        rows_of(path, field="a/b/c")
    assert rows_of(write_lines(path, [json.dumps(rows[1])]), field="a/b/c") == ["C"]
    with pytest.raises(DemixError, match=r":1: .* string field 'a/b' \(its fields: body, a\)"):
        rows_of(path, field="a/b")


def test_rows_are_left_out_by_their_values(tmp_path: Path) -> None:
    rows = [
        {"text": "0", "lang": "en", "year": 2019, "meta": {"kind": "post"}},
        {"text": "1", "lang": "de", "year": 2020, "meta": {"kind": "post"}},
        {"text": "2", "lang": "en", "year": 2020, "meta": {"kind": "comment"}},
        {"text": "3", "lang": "fr", "year": 2019, "meta": "none"},
        {"text": "4"},
        {"title": "no text", "split": "other", "lang": "it"},
    ]
    path = write_lines(tmp_path / "law.jsonl", map(json.dumps, rows))
    assert rows_of(path, lang="en") == ["0", "2"]
    assert rows_of(path, lang="en|fr") == ["0", "2", "3"]
    assert rows_of(path, lang="en|fr", year="2019") == ["0", "3"]
    assert rows_of(path, meta_kind="post") == ["0", "1"]
    assert rows_of(path, lang="e") == []
    with pytest.raises(DemixError, match=":6: "):
        rows_of(path, lang="it")


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "cut": ('{"text": "a', "broken JSON: .* at column 12"),
    "no JSON": ("hello", "broken JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "broken JSON"),
    "invalid UTF-8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    "missing text": ('{"id": "a"}', "string field 'text'"),
    "text of another type": ('{"text": 3}', "string field 'text'"),
    "null text": ('{"text": null}', "string field 'text'"),
    "no object": ('["text"]', "string field 'text'"),
    "wrong split": ('{"text": "a", "split": "eval"}', "unknown split 'eval'; use train, valid"),
    "empty split": ('{"text": "a", "split": ""}', "unknown split ''"),
    "lone surrogate": ('{"text": "\\ud800"}', "field 'text' has a lone surrogate"),
    "surrogate as id": ('{"text": "a", "id": "\\ud800"}', "field 'id' has a lone surrogate"),
}


def test_bad_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for ending in ENDINGS:
        for line, message in BROKEN.values():
            with case(ending, line, message):
                folder = next(fresh)
                path = write_lines(folder / f"law.{ending}", [*numbered(2), "", line, *numbered(2)])
                with pytest.raises(
                    DemixError, match=rf"^/[^\n]*/law\.{ending}:4: [^\n]*{message}[^\n]*$"
                ):
                    read(path)


def test_odd_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for line in [
        '{"text": "a", "split": ["train"]}',
        '{"text": "a", "number": ' + "1" * 5000 + "}",
        '{"text": "a", "list": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ]:
        with case(line):
            folder = next(fresh)
            path = write_lines(folder / "law.jsonl", [*numbered(2), line])
            with pytest.raises(DemixError, match=r"/law\.jsonl:3: "):
                read(path)


def test_as_many_bad_lines_as_allowed_are_skipped(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for ending in ENDINGS:
        with case(ending):
            folder = next(fresh)
            lines = ["{", *numbered(3), "[1]", *numbered(2), '{"text": 1}']
            path = write_lines(folder / f"law.{ending}", lines)
            texts = [document.text for document in read(path, allowed=3)]
            assert texts == [f"document {i}" for i in (0, 1, 2, 0, 1)]


def test_one_bad_line_more_than_allowed_is_an_error(tmp_path: Path) -> None:
    lines = ["{", *numbered(3), "[1]", '{"text": 1}', *numbered(1)]
    path = write_lines(tmp_path / "law.jsonl", lines)
    with pytest.raises(DemixError, match=r"law\.jsonl:6: .*\(2 bad lines were allowed\)$"):
        read(path, allowed=2)


def test_bad_lines_of_several_parts_are_counted_together(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["{", *numbered(2)])
    write_lines(tmp_path / "b.jsonl", [*numbered(2), "{"])
    parts = TextFiles(str(tmp_path), part_bytes=10).parts()
    broken = BadRecords(2)
    assert len(parts) > 2
    assert len(read_parts(parts, broken)) == 4
    assert [place.split(": ")[0] for place in broken.messages] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b.jsonl:3",
    ]
    with pytest.raises(DemixError, match=r"b\.jsonl:3: .*\(1 bad lines were allowed\)"):
        read_parts(parts, BadRecords(1))


def test_invalid_utf8_in_a_text_file_is_named_or_tolerated(tmp_path: Path) -> None:
    write_texts(tmp_path, {"a.txt": "fine", "x/b.txt": b"ab\xe9c", "x/c.txt": "fine too"})
    with pytest.raises(DemixError, match=r"/x/b\.txt: invalid UTF-8 at byte 2$"):
        read(tmp_path)
    assert [document.id for document in read(tmp_path, allowed=1)] == ["a.txt", "x/c.txt"]


@functools.cache
def archive(ending: str) -> bytes:
    rng = random.Random(0)
    texts = ("".join(rng.choices("abcdefghij ", k=200)) for _ in range(3000))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    return compress(lines.encode(), ending)


def cut_short(data: bytes, share: float) -> bytes:
    return data[: int(share * len(data))]


def zero_checksum(data: bytes, start: int) -> bytes:
    return data[:start] + b"\0" * 4 + data[start:][4:]


def test_cut_archive_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for allowed in [0, 1]:
        for cut in [0.1, 0.5, 0.99]:
            for ending in ENDINGS[1:]:
                with case(allowed, cut, ending):
                    folder = next(fresh)
                    content = cut_short(archive(ending), cut)
                    (folder / f"law.{ending}").write_bytes(content)
                    with pytest.raises(
                        DemixError, match=rf"law\.{ending} cannot be decompressed: .*end"
                    ):
                        read(folder / f"law.{ending}", allowed)


def test_archive_that_is_none_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for ending in ENDINGS[1:]:
        with case(ending):
            folder = next(fresh)
            (folder / f"law.{ending}").write_text('{"text": "a"}\n')
            with pytest.raises(DemixError, match=rf"law\.{ending} cannot be decompressed: "):
                read(folder / f"law.{ending}")


def test_zst_of_any_window_is_read(tmp_path: Path) -> None:
    line = b'{"text": "a"}\n'
    for log in range(10, 32):  # as of `zstd --long=31`
        block = (len(line) << 3 | 1).to_bytes(3, "little") + line
        frame = b"\x28\xb5\x2f\xfd\0" + bytes([(log - 10) << 3]) + block
        (tmp_path / "law.jsonl.zst").write_bytes(frame)
        assert [d.text for d in read(tmp_path / "law.jsonl.zst")] == ["a"]


def test_zst_that_needs_a_dictionary_says_what_to_do(tmp_path: Path) -> None:
    data = zstandard.train_dictionary(1000, [b"%d hello %d" % (i, i) * 9 for i in range(999)])
    frame = zstandard.ZstdCompressor(dict_data=data).compress(b'{"text": "hello"}\n')
    (tmp_path / "law.jsonl.zst").write_bytes(frame)
    message = r"law.jsonl.zst cannot be decompressed: .*[Dd]ictionary.*; .*decompress it first$"
    with pytest.raises(DemixError, match=message):
        read(tmp_path / "law.jsonl.zst")


def test_archive_with_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for ending in ENDINGS[1:]:
        with case(ending):
            folder = next(fresh)
            trailer = {"gz": -8, "zst": -4, "bz2": -8, "xz": -20}[ending.rpartition(".")[2]]
            content = zero_checksum(archive(ending), trailer)
            (folder / f"law.{ending}").write_bytes(content)
            with pytest.raises(DemixError, match=rf"law\.{ending} cannot be decompressed: "):
                read(folder / f"law.{ending}")


def test_archive_with_a_broken_block_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    with pytest.raises(DemixError, match=r"law\.jsonl\.gz cannot be decompressed: "):
        read(tmp_path / "law.jsonl.gz")
