"""Text in files: which files a place has, on disks and in buckets, and whether they changed."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from bucket import Bucket
from cases import case, folders

from demix_jax.data.sources.base import BadRecords, Document, Selection
from demix_jax.data.sources.listing import find_files, list_folder, open_binary
from demix_jax.data.sources.text_files import TextFiles, read_jsonl
from demix_jax.errors import DemixError

ROW = '{"text": "A", "id": "a"}\n'
FILES = {
    "a.jsonl": ROW,
    "b-1.jsonl": ROW,
    "b-2.jsonl": ROW,
    "b-10.jsonl": ROW,
    "notes.txt": "N",
    "train/c.jsonl": ROW,
    "train/deep/d.jsonl": ROW,
    ".hidden.jsonl": ROW,
    ".git/e.jsonl": ROW,
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(place: Path | str) -> list[str]:
    return [file.name for file in find_files(str(place))]


def texts(place: Path | str) -> list[str]:
    parts = TextFiles(str(place)).parts()
    return [document.text for part in parts for document in part.documents(BadRecords())]


@pytest.fixture(params=["disk", "file", "memory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that holds FILES."""
    write(tmp_path, FILES)
    if request.param == "disk":
        return str(tmp_path)
    if request.param == "file":
        return f"file://{tmp_path}"
    if request.param == "bucket":
        for name, text in FILES.items():
            Bucket.objects[f"{tmp_path.name}/{name}"] = text.encode()
        return f"bucket://{tmp_path.name}"
    memory = fsspec.filesystem("memory")
    for name, text in FILES.items():
        memory.pipe(f"/{tmp_path.name}/{name}", text.encode())
    return f"memory://{tmp_path.name}"


def test_files_are_found_anywhere(place: str) -> None:
    for pattern, expected in [
        ("a.jsonl", ["a.jsonl"]),
        (".hidden.jsonl", [".hidden.jsonl"]),
        ("train", ["c.jsonl", "deep/d.jsonl"]),
        ("train/", ["c.jsonl", "deep/d.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b-1.jsonl", "b-10.jsonl", "b-2.jsonl"]),
        ("b-?.jsonl", ["b-1.jsonl", "b-2.jsonl"]),
        ("b-[2-9].jsonl", ["b-2.jsonl"]),
        ("b*", ["b-1.jsonl", "b-10.jsonl", "b-2.jsonl"]),
        ("*/*.jsonl", ["train/c.jsonl"]),
        ("train/*", ["c.jsonl"]),
        ("tr*/**/*.jsonl", ["train/c.jsonl", "train/deep/d.jsonl"]),
        (
            "**/*.jsonl",
            ["a.jsonl", "b-1.jsonl", "b-10.jsonl", "b-2.jsonl", "train/c.jsonl"]
            + ["train/deep/d.jsonl"],
        ),
        (".git/*", ["e.jsonl"]),
        ("*.json", []),
        ("none.jsonl", []),
        ("none/*", []),
    ]:
        with case(pattern, expected):
            found = find_files(f"{place}/{pattern}")
            assert [file.name for file in found] == expected
            assert all(file.size == len(ROW) and file.etag for file in found)
            assert [open_binary(file.place).read().decode() for file in found] == [ROW] * len(found)


def test_a_folder_is_found_anywhere(place: str) -> None:
    expected = sorted(name for name in FILES if not name.startswith("."))
    assert names(place) == names(f"{place}/") == expected
    visible = {"a.jsonl", "b-1.jsonl", "b-2.jsonl", "b-10.jsonl", "notes.txt"}
    expected_entries = [(name, False) for name in visible] + [("train", True)]
    assert list_folder(place) == list_folder(f"{place}/") == sorted(expected_entries)


def test_documents_are_the_same_anywhere(place: str, tmp_path: Path) -> None:
    def documents(folder: str) -> list[Document]:
        parts = TextFiles(f"{folder}/**/*.jsonl", part_bytes=30).parts()
        return [document for part in parts for document in part.documents(BadRecords())]

    found = documents(place)
    assert found == documents(str(tmp_path))
    assert [document.split for document in found] == [None] * 4 + ["train"] * 2


def test_relative_places_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, FILES))
    assert names("train") == ["c.jsonl", "deep/d.jsonl"]
    assert names("b-*.jsonl") == ["b-1.jsonl", "b-10.jsonl", "b-2.jsonl"]
    assert texts("./a.jsonl") == ["A"]


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for name in ["law[1]", "what?", "a*"]:
        with case(name):
            folder = next(fresh)
            write(folder, {f"{name}/x.jsonl": ROW, "law1/y.jsonl": ROW})
            assert names(folder / name) == names(folder / name / "x.jsonl") == ["x.jsonl"]
            assert texts(folder / name) == ["A"]


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "far", {"x.jsonl": ROW, "y.txt": "Y"})
    law = write(tmp_path / "law", {"b.jsonl": ROW})
    (law / "a.jsonl").symlink_to(tmp_path / "far" / "x.jsonl")
    (tmp_path / "med").symlink_to(law)
    assert names(law) == names(tmp_path / "med") == names(law / "*") == ["a.jsonl", "b.jsonl"]
    assert ("med", True) in list_folder(str(tmp_path))
    stamp = TextFiles(str(law)).cheap_fingerprint()
    os.utime(tmp_path / "far" / "x.jsonl", (1, 1))
    assert TextFiles(str(law)).cheap_fingerprint() != stamp
    (law / "c.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DemixError, match=r"law cannot be listed: .*c\.jsonl"):
        names(law)


def test_links_to_folders_below_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": ROW})
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(tmp_path) == ["a.jsonl"]


def test_place_without_files_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for missing in ["none", "none.jsonl", "*.jsonl", "folder"]:
        with case(missing):
            folder = next(fresh)
            (folder / "folder").mkdir()
            files = TextFiles(f"{folder}/{missing}")
            for ask in (files.parts, files.cheap_fingerprint, files.fingerprint):
                with pytest.raises(
                    DemixError, match="has no files; name a file, a folder or a pattern"
                ):
                    ask()


def test_objects_that_mark_folders_are_no_files() -> None:
    for name in ("", "train/", "train/a.jsonl", "b.jsonl"):
        Bucket.objects[f"marked/law/{name}"] = ROW.encode() if name.endswith("l") else b""
    assert names("bucket://marked/law") == ["b.jsonl", "train/a.jsonl"]
    assert texts("bucket://marked/law") == ["A", "A"]


def test_rows_of_plain_text_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": ROW, "b.txt": "B"})
    for rows in (Selection("body"), Selection(where=(("lang", ("en",)),))):
        with pytest.raises(DemixError, match="has files that are not .*field and where are for"):
            TextFiles(str(tmp_path), rows).parts()


def test_what_is_no_file_cannot_be_read_as_one(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for path in ["", "none", "*"]:
        with case(path):
            folder = next(fresh)
            write(folder, {"a.jsonl": ROW, "b.jsonl": ROW})
            with pytest.raises(DemixError, match="is not a file"):
                read_jsonl(f"{folder}/{path}")


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DemixError, match=f"^{path} cannot be read: "):
            open_binary(str(path))


ASKING: list[Callable[[str], object]] = [find_files, list_folder, open_binary]


@pytest.mark.parametrize("ask", ASKING)
def test_file_system_that_is_not_installed_names_its_package(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object]
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DemixError, match=r"^gs://b/law\.jsonl cannot be opened: .* gcsfs "):
        ask("gs://b/law.jsonl")


def test_file_system_that_does_not_exist_is_an_error() -> None:
    for ask in ASKING:
        message = r"^gx://b/law\.jsonl cannot be opened: .*gx"
        with case(ask), pytest.raises(DemixError, match=message):
            ask("gx://b/law.jsonl")


def test_what_the_client_of_a_bucket_raises_is_one_line() -> None:
    for ask in ASKING:
        with (
            case(ask),
            pytest.raises(DemixError, match=r"^bucket://private/x cannot be \w+: no credentials$"),
        ):
            ask("bucket://private/x")


def test_file_of_unknown_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bucket, "sizes_known", False)
    monkeypatch.setitem(Bucket.objects, "unsized/a.jsonl", ROW.encode())
    with pytest.raises(DemixError, match=r"unsized/a\.jsonl does not say its size; copy it"):
        find_files("bucket://unsized")


LAW = {"a.jsonl": ROW, "train/b.jsonl": ROW * 2, "train/c.jsonl": ROW * 3}


@pytest.fixture
def law(tmp_path: Path) -> Path:
    return write(tmp_path / "law", LAW)


def test_fingerprint_and_stamp_stay_when_nothing_changed(law: Path) -> None:
    one, other = TextFiles(str(law)), TextFiles(f"{law}/")
    assert one.fingerprint() == other.fingerprint()
    assert one.cheap_fingerprint() == other.cheap_fingerprint()


def test_fingerprint_stays_and_stamp_follows_when_files_are_touched(law: Path) -> None:
    files = TextFiles(str(law))
    before = files.fingerprint(), files.cheap_fingerprint()
    os.utime(law / "train" / "b.jsonl", (1, 1))
    assert files.fingerprint() == before[0]
    assert files.cheap_fingerprint() != before[1]


def test_fingerprint_stays_when_files_move_as_a_whole(law: Path, tmp_path: Path) -> None:
    before = TextFiles(str(law)).fingerprint()
    shutil.move(law, tmp_path / "elsewhere")
    assert TextFiles(f"{tmp_path}/elsewhere").fingerprint() == before
    assert TextFiles(f"file://{tmp_path}/elsewhere").fingerprint() == before


def same_size(law: Path) -> None:
    (law / "a.jsonl").write_text(ROW.replace("A", "B"))
    os.utime(law / "a.jsonl", (2, 2))  # of a later second


@pytest.mark.parametrize(
    "change",
    [
        same_size,
        lambda law: (law / "a.jsonl").write_text(ROW + ROW),
        lambda law: (law / "d.jsonl").write_text(""),
        lambda law: (law / "a.jsonl").unlink(),
        lambda law: (law / "a.jsonl").rename(law / "z.jsonl"),
        lambda law: (law / "train").rename(law / "valid"),
        lambda law: (law / "a.jsonl").rename(law / "train" / "a.jsonl"),
    ],
    ids=["content", "size", "one more", "one less", "name", "split", "folder"],
)
def test_fingerprint_and_stamp_follow_the_files(law: Path, change: Callable[[Path], None]) -> None:
    files = TextFiles(str(law))
    before = files.fingerprint(), files.cheap_fingerprint()
    change(law)
    assert files.fingerprint() != before[0]
    assert files.cheap_fingerprint() != before[1]


def test_fingerprint_follows_bytes_that_move_between_files(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a.txt": "A", "b.txt": "B"})
    write(tmp_path / "two", {"a.txt": "AB", "b.txt": ""})
    prints = {TextFiles(f"{tmp_path}/{name}").fingerprint() for name in ("one", "two")}
    assert len(prints) == 2


def test_fingerprint_and_stamp_follow_what_is_taken_of_the_files(law: Path) -> None:
    rows = [
        Selection(),
        Selection("body"),
        Selection("id"),
        Selection(where=(("lang", ("en",)),)),
        Selection(where=(("lang", ("en", "de")),)),
        Selection(where=(("lang", ("en",)), ("lang", ("de",)))),
    ]
    sources = [TextFiles(str(law), row) for row in rows]
    sources += [TextFiles(str(law), part_bytes=size) for size in (1, 2)]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert len({source.cheap_fingerprint() for source in sources}) == len(sources)


def test_fingerprint_in_buckets_is_what_they_say_of_content(law: Path) -> None:
    def fingerprint(name: str, **changed: str) -> str:
        for file, text in (LAW | changed).items():
            Bucket.objects[f"{name}/{file}"] = text.encode()
        files = TextFiles(f"bucket://{name}")
        assert files.cheap_fingerprint()
        return files.fingerprint()

    one = fingerprint("one")
    assert fingerprint("two") == one
    assert fingerprint("three", **{"a.jsonl": ROW.replace("A", "B")}) != one


def test_fingerprint_in_memory_follows_writing() -> None:
    memory, files = fsspec.filesystem("memory"), TextFiles("memory://followed")
    prints = []
    for text in (ROW, ROW.replace("A", "B")):
        memory.pipe("/followed/a.jsonl", text.encode())
        prints.append((files.cheap_fingerprint(), files.fingerprint()))
        assert (files.cheap_fingerprint(), files.fingerprint()) == prints[-1]
    memory.rm("/followed", recursive=True)
    assert prints[0][0] != prints[1][0]
    assert prints[0][1] != prints[1][1]
