"""A store of files, on a disk and elsewhere: what is in it is whole, whoever else writes."""

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
from bucket import Bucket
from cases import case

from demix_jax.data.prepare.storage import Store
from demix_jax.errors import DemixError

SIZE = 300_000
KILLED = """
import os, sys
from demix_jax.data.prepare.storage import Store
with Store(sys.argv[1]).writing("a/b.bin") as path:
    path.write_bytes(b"x" * 1000)
    os.kill(os.getpid(), 9)
"""
FETCHED = """
from demix_jax.data.prepare.storage import Store
store = Store("memory://fetched")
store.write_json("a.json", {"a": 1})
print(store.fetch("a.json"))
assert store.fetch("a.json").exists()
"""


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(str(tmp_path / "store"))
    return Store(f"memory://{uuid.uuid4().hex}/store")


def write(store: Store, name: str, data: bytes = b"data") -> None:
    with store.writing(name) as path:
        path.write_bytes(data)


def read(store: Store, name: str) -> bytes:
    with fsspec.open(store.url(name), "rb") as file:
        return file.read()


def fail_to_write(store: Store, name: str, paths: list[Path]) -> None:
    with store.writing(name) as path:
        path.write_bytes(b"half")
        paths.append(path)
        raise KeyError


def test_file_is_there_when_its_block_has_ended(store: Store) -> None:
    with store.writing("a/b.bin") as path:
        path.write_bytes(b"half")
        assert not store.exists("a/b.bin")
        path.write_bytes(b"whole")
    assert store.exists("a/b.bin")
    assert store.subfolder("a").names() == ["b.bin"]
    assert read(store, "a/b.bin") == b"whole"
    assert not path.exists()


def test_written_again_is_replaced(store: Store) -> None:
    write(store, "a.bin", b"a long first one")
    with store.writing("a.bin") as path:
        path.write_bytes(b"short")
        assert read(store, "a.bin") == b"a long first one"
    assert read(store, "a.bin") == b"short"


def test_exception_leaves_what_was(store: Store) -> None:
    for before in [None, b"before"]:
        with case(before):
            write(store, "a/other.bin")
            if before:
                write(store, "a/b.bin", before)
            names = store.subfolder("a").names()
            paths: list[Path] = []
            with pytest.raises(KeyError):
                fail_to_write(store, "a/b.bin", paths)
            assert (
                store.subfolder("a").names()
                == names
                == (["b.bin", "other.bin"] if before else ["other.bin"])
            )
            assert not paths[0].exists()
            if before:
                assert read(store, "a/b.bin") == before


def test_block_that_writes_nothing_is_an_error(store: Store) -> None:
    with pytest.raises(FileNotFoundError), store.writing("a/b.bin"):
        pass
    assert store.subfolder("a").names() == []


def test_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    store = Store(str(tmp_path))
    assert done.returncode == -9
    assert store.exists("a")
    assert not store.exists("a/b.bin")
    assert store.read_json("a/b.bin") == {}


def write_often(store: Store, letter: str) -> None:
    for _ in range(20):
        write(store, "a/b.bin", letter.encode() * SIZE)


def is_whole(data: bytes) -> bool:
    return data[:1] in (b"p", b"q", b"r", b"s") and data == data[:1] * SIZE


def test_threads_that_write_one_name_leave_one_whole_file(store: Store) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write_often, [store] * 4, "pqrs"))
    assert store.subfolder("a").names() == ["b.bin"]
    assert is_whole(read(store, "a/b.bin"))


@pytest.mark.slow
def test_processes_that_write_one_name_show_only_whole_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write(store, "a/b.bin", b"p" * SIZE)
    context, seen = multiprocessing.get_context("spawn"), set()
    with concurrent.futures.ProcessPoolExecutor(3, context) as pool:
        writing = [pool.submit(write_often, store, letter) for letter in "qrs"]
        while not all(future.done() for future in writing):
            data = read(store, "a/b.bin")
            assert is_whole(data)
            seen.add(data[:1])
        for future in writing:
            future.result()
    assert len(seen) > 1
    assert store.subfolder("a").names() == ["b.bin"]


def test_json_comes_back_and_is_for_people_too(store: Store) -> None:
    values = {"name": "é", "counts": [1, 2.5, None], "more": {"a": True}}
    store.write_json("a/meta.json", values)
    assert store.read_json("a/meta.json") == values
    assert len(read(store, "a/meta.json").decode().splitlines()) > len(values)
    assert store.read_json("none.json") == store.read_json("none/meta.json") == {}


def test_damaged_json_is_an_error(store: Store) -> None:
    for content in [b"", b'{"a": 1', b"\xff", b"null x"]:
        with case(content):
            write(store, "meta.json", content)
            with pytest.raises(DemixError, match=r"/store/meta\.json is damaged: .*; delete it$"):
                store.read_json("meta.json")


def test_folders_list_what_they_hold(store: Store) -> None:
    assert store.names() == store.subfolder("a").names() == []
    assert store.subfolder("a").sizes() == {}
    for name, size in {"a/y": 3, "a/x": 0, "a/deep/z": 5, "b": 7}.items():
        write(store, name, b"x" * size)
    assert store.names() == ["a", "b"]
    assert store.subfolder("a").names() == ["deep", "x", "y"]
    assert store.subfolder("a").sizes() == {"x": 0, "y": 3}
    assert store.subfolder("a/deep").sizes() == {"z": 5}
    assert [store.exists(name) for name in ("a", "a/deep", "a/x", "a/z")] == [True] * 3 + [False]


def test_below_is_the_store_of_a_folder(store: Store) -> None:
    write(store.subfolder("a"), "deep/x", b"found")
    assert store.subfolder("a/deep").names() == ["x"]
    assert read(store, "a/deep/x") == b"found"
    assert Store(store.root + "/").url("a") == store.url("a")
    assert store.subfolder("a").is_local == store.is_local == ("://" not in store.root)


def test_delete_takes_a_file_or_a_folder_or_nothing(store: Store) -> None:
    for name in ("a/x", "a/deep/y", "ab", "b/x"):
        write(store, name)
    store.delete("none")
    store.delete("b/x")
    store.delete("a")
    assert store.names() in (["ab"], ["ab", "b"])  # only disks have empty folders
    assert not store.exists("a/deep/y")
    assert not store.exists("b/x")


def test_fetch_gives_files_and_folders_of_this_disk(store: Store) -> None:
    write(store, "a/x", b"X")
    write(store, "a/deep/y", b"Y")
    assert store.fetch("a/x").read_bytes() == b"X"
    folder = store.fetch("a")
    assert (folder / "x").read_bytes() == b"X"
    assert (folder / "deep" / "y").read_bytes() == b"Y"
    assert sorted(path.name for path in folder.iterdir()) == ["deep", "x"]
    assert store.fetch("a") == folder
    assert (folder == Path(store.url("a"))) == store.is_local


def test_fetched_copies_are_gone_when_the_process_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FETCHED], capture_output=True, text=True, check=True
    )
    path = Path(done.stdout.strip())
    assert path.name == "a.json"
    assert not path.parent.exists()


def test_publish_moves_a_folder_here(store: Store, tmp_path: Path) -> None:
    write(store, "other")
    made = tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    (made / "x").write_bytes(b"X")
    (made / "deep" / "y").write_bytes(b"Y")
    store.publish(made, "tokenizer")
    assert not made.exists()
    assert store.names() == ["other", "tokenizer"]
    assert store.subfolder("tokenizer").names() == ["deep", "x"]
    assert read(store, "tokenizer/x") == b"X"
    assert read(store, "tokenizer/deep/y") == b"Y"


def test_store_is_pickled_as_its_place(store: Store) -> None:
    write(store, "a/x", b"X")
    store.subfolder("a").names()
    copy = pickle.loads(pickle.dumps(store.subfolder("a")))
    assert copy == store.subfolder("a")
    assert read(copy, "x") == b"X"
    write(copy, "y")
    assert store.subfolder("a").names() == ["x", "y"]


def test_what_others_write_is_seen() -> None:
    store = Store("bucket://shared/store")
    Bucket.objects["shared/store/a/x"] = b"x"
    assert store.subfolder("a").names() == ["x"]
    assert store.subfolder("a").sizes() == {"x": 1}
    assert not store.exists("a/y")
    Bucket.objects["shared/store/a/y"] = json.dumps({"y": 1}).encode()
    assert store.exists("a/y")
    assert store.subfolder("a").names() == ["x", "y"]
    assert store.subfolder("a").sizes() == {"x": 1, "y": 8}
    assert store.read_json("a/y") == {"y": 1}


def test_relative_store_is_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Store("data"), "a/x", b"X")
    assert (tmp_path / "data" / "a" / "x").read_bytes() == b"X"
    assert Store("data").subfolder("a").names() == ["x"]
    assert os.fspath(Store("data").fetch("a/x")) == "data/a/x"


def test_store_in_a_file_system_that_is_not_installed_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DemixError, match=r"^gs://bucket/data cannot be opened: .* gcsfs "):
        Store("gs://bucket/data").exists("data.json")
