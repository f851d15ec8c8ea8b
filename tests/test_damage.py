"""Damaged small files of runs, data and results: one line that names the file, or the right result.

Every verb is called by its real entry point, in this process.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import edits
import numpy as np
import pytest
from absl import flags

from demix_jax.cli.main import main
from demix_jax.experts.lifecycle import add_experts, remove_experts

pytestmark = pytest.mark.slow

Damage = Callable[[bytes], bytes | None]  # None: a folder in its place
DAMAGES: dict[str, Damage] = {
    "empty": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "an object": lambda whole: b"{}",
    "a list": lambda whole: b"[]",
    "a number": lambda whole: b"3",
    "nested": lambda whole: b"[" * 100_000,
    "not UTF-8": lambda whole: b'{"caf\xe9": 1}',
    "cut": lambda whole: whole[: len(whole) // 2],
    "a bad byte": lambda whole: whole[: len(whole) // 2] + b"\xff" + whole[len(whole) // 2 + 1 :],
    "another key": lambda whole: re.sub(rb'"(\w+)":', rb'"x\1":', whole, count=1),
    "another type": lambda whole: re.sub(rb': ?(["0-9[])', rb': {"x": 1}, "y": \1', whole, count=1),
    "a folder": lambda whole: None,
}
STEP = "checkpoints/6"


class Base:
    """A run that was edited and evaluated, with its data and its results beside it."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.out = folder, folder / "run", folder / "out"

    def verb(self, name: str, **more: object) -> list[object]:
        """Returns the arguments of a verb."""
        own: dict[str, Any] = {
            "score": {"input": self.folder / "a.jsonl", "output": self.folder / "s.npz",
                      "prior": "cached:law"},
            "evaluate": {"out": self.out, "tokens": 64, "domains": "law,med",
                         "modes": "known,uniform,cached", "switch_rates": "0,0.1"},
            "experts rename": {"name": "med", "to": "acts"},
            "experts remove": {"name": "med"},
            "experts add": {"name": "more", "from": "law"},
            "experts merge": {"to": "more", "weights": "law=0.5,med=0.5"},
            "experts export": {"name": "med", "output": self.folder / "med.safetensors"},
            "materialize": {"expert": "med", "out": self.folder / "dense"},
        }  # fmt: skip
        values = {"workdir": self.run} | own.get(name, {}) | more
        return [*name.split(), *(f"--{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one that tests leave as they found it."""
    folder = tmp_path_factory.mktemp("made")
    run = edits.make_run(folder / "run", ("law", "med", "code"), steps=(4, 6))
    add_experts(run, ["copy"], ["law"])
    remove_experts(run, ["code"])
    (run / "metrics.jsonl").write_text('{"step": 6, "loss": 1.5}\n')
    (folder / "a.jsonl").write_text('{"text": "the court held that the motion is denied"}\n')
    base = Base(folder)
    assert demix(base.verb("evaluate")) == 0
    assert demix(base.verb("score")) == 0
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Base:
    """A run to be edited, with files of its own."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "a.jsonl", tmp_path)
    return Base(tmp_path)


def demix(arguments: Sequence[object]) -> int:
    """Runs a verb; returns its exit status."""
    old = set(flags.FLAGS)
    try:
        main(["demix", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        for name in set(flags.FLAGS) - old:
            delattr(flags.FLAGS, name)


def refusal(arguments: Sequence[object], capfd: pytest.CaptureFixture) -> str:
    """The one line of a verb that must fail; "" if it does not."""
    capfd.readouterr()
    status, text = demix(arguments), capfd.readouterr().err
    assert status in (0, 2)
    lines = [line for line in text.splitlines() if "%|" not in line]  # no progress bar
    assert len(lines) == (status == 2), text
    return "".join(lines)


def damaged(path: Path, names: Sequence[str] = tuple(DAMAGES)) -> Iterator[str]:
    """Damages a file in every way, one after the other, and puts it right again."""
    whole = path.read_bytes()
    for name in names:
        content = DAMAGES[name](whole)
        if content == whole:
            continue
        path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        yield name
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)


def rows(base: Base) -> list[dict]:
    timing = ("seconds", "tokens_per_second")
    found = json.loads((base.out / "results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in timing} for row in found]


READ_BY = {
    "run.json": ("experts list", "experts verify", "score", "evaluate", "materialize"),
    "tokenizer/tokenizer_meta.json": ("experts list", "score", "evaluate", "experts add"),
    f"{STEP}/meta/metadata": ("experts list", "experts verify", "score", "experts merge"),
    "checkpoints/4/meta/metadata": ("experts verify", "experts rename", "experts remove"),
    "receipts/0001-add-copy.json": ("experts verify", "experts rename", "experts add"),
    "receipts/0002-remove-code.json": ("experts verify", "experts merge"),
    "priors/law.json": ("experts verify", "experts remove", "evaluate", "score"),
}


@pytest.mark.parametrize("name", READ_BY)
def test_a_damaged_file_of_a_run_is_named_and_nothing_changes(made, name, capfd):
    base = Base(made)
    for how in damaged(base.run / name):
        before = edits.contents(base.folder)
        for verb in READ_BY[name]:
            if verb != "experts verify" or how == "cut":  # it is slow
                assert name in refusal(base.verb(verb), capfd), (how, verb)
        after = edits.contents(base.folder)
        assert {file for file in after if after[file] != before.get(file)} <= {"run/lock"}, how


def test_orbax_s_list_of_items_is_written_anew(base, capfd):
    """Each time by another edit; what the edit leaves is right, and nothing else is needed."""
    path, verbs = base.run / STEP / "_CHECKPOINT_METADATA", ("rename", "remove", "add", "merge")
    kept = shutil.copytree(base.run, base.folder / "kept")
    ways = ("empty", "missing", "an object", "cut")
    for how, verb in zip(ways, itertools.cycle(verbs), strict=False):
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(DAMAGES[how](path.read_bytes()))
        assert "_CHECKPOINT_METADATA is " in refusal(base.verb("experts verify"), capfd), how
        assert refusal(base.verb(f"experts {verb}"), capfd) == "", how
        found = json.loads(path.read_text())["item_handlers"]
        assert (
            set(found)
            == edits.items(base.run)
            == {*edits.meta_of(base.run)["hashes"], "data", "meta"}
        )
        assert list(found) == sorted(found)
        assert len(set(found.values())) == 2
        assert refusal(base.verb("experts verify"), capfd) == "", how
        shutil.rmtree(base.run)
        shutil.copytree(kept, base.run)


def test_a_folder_in_the_place_of_orbax_s_list_changes_nothing(base, capfd):
    path = base.run / STEP / "_CHECKPOINT_METADATA"
    path.unlink()
    path.mkdir()
    before = edits.contents(base.run)
    assert "_CHECKPOINT_METADATA" in refusal(base.verb("experts remove"), capfd)
    assert {n: d for n, d in edits.contents(base.run).items() if "receipts" not in n} == {
        n: d for n, d in before.items() if "receipts" not in n
    }
    assert "med" in edits.meta_of(base.run)["experts"]


def test_what_nothing_reads_may_be_damaged(made, capfd):
    base, scores = Base(made), (made / "s.npz").read_bytes()
    step = base.run / STEP
    files = step / "_CHECKPOINT_METADATA", step / "data" / "metadata", base.run / "metrics.jsonl"
    for path in files:
        for how in damaged(path, ("empty", "a folder")):
            assert refusal(base.verb("score"), capfd) == "", (path, how)
            assert (base.folder / "s.npz").read_bytes() == scores


def test_a_damaged_array_is_one_line(base, capfd):
    item = "expert.med"
    folder = base.run / STEP / item / "layers.ffn.up.bias"
    ways = DAMAGES | {
        "wider": lambda whole: whole.replace(b"<f4", b"<f8"),
        "whole numbers": lambda whole: whole.replace(b"<f4", b"<i4"),
        "the other end": lambda whole: whole.replace(b"<f4", b">f4"),
        "longer": lambda whole: whole.replace(b'"shape":[', b'"shape":[9'),
        "negative": lambda whole: whole.replace(b'"shape":[', b'"shape":[-'),
    }
    for name, hows in ((".zarray", ways), ("0.0", ["empty", "cut", "a bad byte"])):
        path = folder / name
        whole = path.read_bytes()
        for how in hows:
            content = ways[how](whole)
            if content is None or content == whole:
                continue
            path.write_bytes(content)
            assert f"item {item!r}" in refusal(base.verb("score", prior="uniform"), capfd), how
        path.unlink()
        for verb in ("experts verify", "experts export", "experts merge", "materialize"):
            assert f"item {item!r}" in refusal(base.verb(verb), capfd), verb
        path.write_bytes(whole)


def test_names_that_only_look_like_steps_are_none(base, capfd):
    run, step = base.run, base.run / STEP
    capfd.readouterr()
    assert demix(base.verb("experts list")) == 0
    table = capfd.readouterr().out
    for name in ("old_9", "best_6", "tmp_12", "07", "+7", "7.0", "٧", "1_000", "9 "):
        shutil.copytree(step, run / "checkpoints" / name)
    (run / "checkpoints" / "8").write_text("a file")
    copies = edits.contents(run / "checkpoints" / "old_9")
    assert demix(base.verb("experts list")) == 0
    assert capfd.readouterr().out == table
    assert refusal(base.verb("score"), capfd) == ""
    assert refusal(base.verb("experts add"), capfd) == ""
    assert refusal(base.verb("experts verify"), capfd).count("tensors of removed experts") == 0
    assert edits.contents(run / "checkpoints" / "old_9") == copies


def test_a_step_under_another_number_is_refused(base, capfd):
    shutil.copytree(base.run / STEP, base.run / "checkpoints" / "9")
    assert "9/meta/metadata is damaged: it is of step 6" in refusal(base.verb("score"), capfd)


def test_damaged_cells_and_traces_are_made_anew(made, capfd):
    base = Base(made)
    expected = rows(base)
    cells, names = sorted((base.out / "cells").iterdir()), [n for n in DAMAGES if n != "a folder"]
    whole = [path.read_bytes() for path in cells]
    for path, name in zip(cells, itertools.cycle(names), strict=False):
        path.write_bytes(DAMAGES[name](path.read_bytes()))
    assert refusal(base.verb("evaluate"), capfd) == ""
    assert rows(base) == expected
    assert [len(path.read_bytes()) > 0.9 * len(w) for path, w in zip(cells, whole, strict=True)]
    path = sorted((base.out / "traces").iterdir())[0]
    kept = dict(np.load(path))
    for _ in damaged(path, ("empty", "a bad byte", "cut", "an object")):
        assert refusal(base.verb("evaluate"), capfd) == ""
        for file in (path, base.out / "traces.npz"):
            found = dict(np.load(file))
            for key, array in kept.items():
                np.testing.assert_array_equal(found[key], array)


@pytest.mark.parametrize("name", ["results.json", "traces.npz"])
def test_damaged_results_are_named(made, name, capfd):
    base = Base(made)
    report = ["report", f"--results={base.out}", f"--out={base.folder / 'report'}"]
    before = base.verb("evaluate", before=base.out)
    for how in damaged(base.out / name):
        assert name in refusal(report, capfd), how
        if name == "results.json":
            assert name in refusal(before, capfd), how


DATA = ("data.json", "law/meta.json", "law/build/00000.json", "tokenizer/tokenizer_meta.json")


@pytest.mark.parametrize("name", DATA)
def test_damaged_data_are_named_or_do_not_matter(made, name, capfd):
    base = Base(made)
    expected = rows(base)
    unread = (
        ("another key", "another type") if name in DATA[1:3] else ()
    )  # format, and counts of training text
    for how in damaged(base.folder / "run-data" / name):
        line = refusal(base.verb("evaluate", refresh_priors=True), capfd)
        assert name in line or how in unread, how
        assert rows(base) == expected
