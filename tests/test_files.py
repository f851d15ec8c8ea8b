"""Paths as people type them, and outputs that are links, pipes or folders."""

import os
import threading
from pathlib import Path

import pytest

from demix_jax.errors import DemixError
from demix_jax.files import PARTIAL, check_output, open_whole, resolve_path, write_json


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home and the working folder: a run, links to it, and a file that a link calls a.json."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "latest").symlink_to("runs/a")
    (tmp_path / "linked").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "a.json").symlink_to("../blob")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_place_has_one_spelling(home):
    spellings = [
        "runs/a",
        "runs/a/",
        "./runs//a",
        "runs/../runs/a",
        "~/runs/a",
        "latest",
        "latest/",
    ]
    spellings += ["linked/a", f"{home}/runs/a", f"file://{home}/runs/a", f"local://{home}/latest"]
    spellings += [f"file://localhost{home}/runs/a/", "file://runs/a", "file://~/runs/a"]
    for typed in spellings:
        assert resolve_path(typed) == f"{home}/runs/a", typed
        assert resolve_path(Path(typed)) or typed.startswith(("file:", "local:"))
    assert resolve_path("runs/new/") == f"{home}/runs/new"


def test_a_link_to_a_file_keeps_the_name_that_says_what_it_is(home):
    for typed in ("runs/a.json", "linked/a.json", "~/linked/../runs/a.json"):
        assert resolve_path(typed) == f"{home}/runs/a.json", typed
    assert resolve_path("/dev/stdin") == "/dev/stdin"


def test_other_urls_and_nothing_stay_as_they_are(home):
    for typed in (
        "gs://b/x/",
        "s3://b/~/../x",
        "https://h/a//b",
        "memory://x",
        "zip://a::file://b",
    ):
        assert resolve_path(typed) == typed
    assert resolve_path("") == resolve_path(" ") == ""
    with pytest.raises(DemixError, match=r"no home of '~nobody-here'; a file .* \./~nobody-here"):
        resolve_path("~nobody-here/x")


def test_what_cannot_be_written_is_refused_beforehand(home):
    for path, folder, message in (
        ("runs", False, "is a folder; name a file"),
        ("latest", False, "is a folder; name a file"),
        ("blob", True, "is a file; name a folder"),
        ("runs/a.json", True, "is a file; name a folder"),
        ("blob/x", False, "blob is no folder"),
        ("blob/x/y", True, "blob is no folder"),
    ):
        with pytest.raises(DemixError, match=message):
            check_output(path, folder=folder)
    for path, folder in (("new/x", False), ("blob", False), ("new/x", True), ("runs", True)):
        check_output(path, folder=folder)


def test_a_link_stays_and_its_target_is_written(home):
    (home / "dangling").symlink_to("runs/later.json")
    for link, target in (("runs/a.json", "blob"), ("dangling", "runs/later.json")):
        write_json(home / link, [1])
        assert (home / link).is_symlink()
        assert (home / target).read_text() == "[\n 1\n]\n"
    assert not list(home.rglob(f"*{PARTIAL}"))
    with pytest.raises(DemixError, match="is a folder"), open_whole(home / "latest"):
        raise AssertionError
    assert not list(home.rglob(f"*{PARTIAL}"))


def test_a_pipe_is_given_the_whole_content_or_nothing(home, capfd):
    os.mkfifo(home / "pipe")
    (home / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda to=read: to.append((home / "pipe").read_bytes()))
        with open_whole(home / name) as file:
            file.write(b"a")
            reader.start()
            file.seek(0, os.SEEK_END)
            file.write(b"b" * 100_000)
        reader.join()
        assert read == [b"a" + b"b" * 100_000]
        assert (home / "pipe").is_fifo()
    with pytest.raises(KeyError), open_whole(home / "pipe"):  # nobody reads: nothing is written
        raise KeyError


def test_a_reader_that_leaves_is_named(home):
    os.mkfifo(home / "pipe")
    reader = os.open(home / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    closing = threading.Timer(0.2, os.close, (reader,))

    def write() -> None:
        with open_whole(home / "pipe") as file:
            file.write(bytes(1 << 20))  # more than a pipe holds
            closing.start()

    with pytest.raises(DemixError, match="pipe was not read to its end"):
        write()
    closing.join()
