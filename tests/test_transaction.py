"""Edits of a checkpoint in place: whole or not at all, one at a time, with a receipt."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import edits
import forks
import numpy as np
import pytest

from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import CachedPrior, save_prior
from demix_jax.experts.lifecycle import add_experts, export_experts, remove_experts, rename_experts
from demix_jax.experts.transaction import edit, read_receipts
from demix_jax.experts.verify import verify
from demix_jax.folder_lock import lock_folder
from demix_jax.typed_files import unseal

EVERY = int(os.environ.get("DEMIX_KILL_EVERY", "251"))  # 1: try every single change of a file


def prior(workdir: Path, name: str, weights: list[float]) -> CachedPrior:
    """A cached prior of the newest checkpoint, saved."""
    version = load_run(workdir).latest()
    found = CachedPrior(name, version.experts, tuple(weights), 0.1, 0.2, 100, version.params_hash)
    save_prior(workdir, found)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Three experts at two steps, two cached priors, and an expert that can be imported."""
    folder = tmp_path_factory.mktemp("base")
    other = edits.make_run(folder / "other", ("chat", "law"), seed=9)
    export_experts(other, ["chat"], folder / "chat.safetensors")
    run = edits.make_run(folder / "run", ("law", "med", "code"), steps=(4, 6))
    prior(run, "med", [0.125, 0.625, 0.25])
    prior(run, "law", [0.5, 0.25, 0.25])
    return run


@pytest.fixture
def run(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "run")


def in_child(call: str) -> subprocess.CompletedProcess:
    """Runs a line of Python in another process, in which JAX has not started."""
    done = forks.python(
        "import edits, jax; from pathlib import Path\n"
        # An entry of the cache that is being written is not killed.
        f"jax.config.update('jax_enable_compilation_cache', False); {call}"
    )
    assert done.returncode == 0, done.stderr
    return done


def dateless(meta: dict) -> dict:
    made = {name: value | {"date": ""} for name, value in meta["provenance"].items()}
    return meta | {"provenance": made, "digest": ""}


def state(workdir: Path) -> dict:
    """All that the checkpoints of a run are: per step, what it says and the files that count."""
    found = {}
    for step in Checkpointer(workdir).steps():
        meta = edits.meta_of(workdir, step)
        parts = edits.contents(edits.step_of(workdir, step)).items()
        folders = {meta.get("folders", {}).get(item, item) for item in meta["hashes"]}
        counted = {n: d for n, d in parts if n.split("/")[0] in folders and "/" in n}
        arrays = {n: d for n, d in counted.items() if n.count("/") == 2}
        found[step] = dateless(meta), arrays
    return found


def everything(workdir: Path) -> dict:
    """What the same command must lead to, however often it was interrupted."""
    listed = json.loads((edits.step_of(workdir) / "_CHECKPOINT_METADATA").read_text())
    receipts = [*read_receipts(workdir).values()]
    kept = ("operation", "experts", "state", "before", "after", "renamed", "dropped")
    kept = (*kept, "to", "older_steps", "started_from_them", "sources", "weights")
    return {
        "state": state(workdir),
        "items": edits.items(workdir),
        "steps": sorted(path.name for path in (workdir / "checkpoints").iterdir()),
        "listed": listed["item_handlers"],
        "priors": edits.contents(workdir / "priors"),
        "receipts": [{key: receipt.get(key) for key in kept} for receipt in receipts],
        "searched": ["scan" in receipt for receipt in receipts],
        "other": sorted(p.name for p in workdir.iterdir() if not p.name.startswith("lock")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", ["add", "import", "rename", "widen", "purge"])
def test_killed_at_any_moment_it_is_the_old_or_the_new_and_can_be_repeated(
    base, tmp_path, command, monkeypatch
):
    killed = shutil.copytree(base.parent, tmp_path / "all")
    folder = tmp_path / "killed"
    folder.mkdir()
    shutil.copy(killed / "chat.safetensors", folder)
    thin = {"widen": 9, "import": 5}.get(command, 3) if EVERY > 1 else 1  # the first two start JAX
    folders = f"Path({str(base)!r}), Path({str(folder)!r})"
    in_child(f"edits.killed_everywhere({command!r}, {folders}, {EVERY}, {thin})")
    old, new = state(base), state(folder / "whole")
    expected = everything(folder / "whole")
    seen, looks = [], set()
    points = sorted((path for path in folder.iterdir() if path.name.isdigit()),
                    key=lambda path: int(path.name))  # fmt: skip
    for workdir in points:
        found = state(workdir)
        assert found[6] in (old[6], new[6]), f"{command} {workdir.name}: neither old nor new"
        assert all(found[step] == old[step] for step in found if step != 6)
        look = (found[6] == new[6], *sorted(edits.items(workdir)), *found)
        if look not in looks:
            edits.restored(workdir)
        looks.add(look)
        seen.append(found[6] == new[6])
        if command == "add" and sum(seen) == 1 and seen[-1]:
            other = shutil.copytree(workdir, tmp_path / "other")
            with pytest.raises(DemixError, match="there is an expert 'copy' already"):
                add_experts(other, ["copy"], ["med"])  # it is not the one that was interrupted
            assert everything(other) == expected
        if everything(workdir) != expected:  # else it was done, but for its exit
            edits.COMMANDS[command](workdir)
        assert everything(workdir) == expected, f"{command}, killed before change {workdir.name}"
        verify(workdir)
        shutil.rmtree(workdir)
    assert seen == sorted(seen), "it went back to the old one"
    assert {*seen} == {False, True}, "not killed both before and after"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["add", "merge", "import", "rename", "remove"])
def test_on_a_full_disk_it_is_the_old_or_the_new_and_can_be_repeated(base, tmp_path, command):
    shutil.copy(base.parent / "chat.safetensors", tmp_path)
    sizes = [0, 10, 100, 300, 1000, 2500, 3000, 5000, 100_000]
    calls = f"{command!r}, Path({str(base)!r}), Path({str(tmp_path)!r}), {sizes}"
    exits = in_child(f"print(*edits.with_full_disk({calls}))").stdout.split()
    assert exits[0] == "3"
    assert exits[-1] == "0"
    assert set(exits) == {"0", "3"}, dict(zip(sizes, exits, strict=True))
    old, expected = state(base), everything(tmp_path / str(sizes[-1]))
    for size, code in zip(sizes, exits, strict=True):
        workdir = tmp_path / str(size)
        if code == "0":
            assert everything(workdir) == expected
            continue
        assert state(workdir)[6] in (old[6], expected["state"][6])
        if state(workdir) == old:
            kept = {name: v for name, v in edits.contents(workdir).items() if "lock" not in name}
            assert kept == edits.contents(base), f"{command} with {size} bytes left something"
        edits.COMMANDS[command](workdir)
        assert everything(workdir) == expected


def test_a_failed_edit_leaves_nothing(run):
    before = edits.files(run)
    with pytest.raises(DemixError, match="no expert 'nosuch'"):
        add_experts(run, ["one", "two"], ["law", "nosuch"])
    assert edits.files(run) == before


def test_an_interrupted_edit_leaves_nothing(run):
    before = edits.files(run)

    def interrupted() -> None:
        with edit(run, "test") as editor:
            editor.link("expert.copy", editor.checkpoint.item("expert.law"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert edits.files(run) == before


def test_a_run_that_is_being_changed_is_refused(run):
    before = edits.files(run)
    with lock_folder(run, "demix train"):
        for command in ("add", "merge", "rename", "remove"):
            with pytest.raises(DemixError, match="is being changed by another process .demix tra"):
                edits.COMMANDS[command](run)
    assert edits.files(run) == before
    edits.COMMANDS["add"](run)


@pytest.mark.slow
def test_of_two_edits_at_once_one_wins_and_the_other_is_told(run, tmp_path):
    """Both start when both are ready; which one wins is open, and maybe one after the other."""
    program = (
        "import sys, edits, forks; from pathlib import Path\n"
        "from demix_jax.errors import DemixError\n"
        "Path(sys.argv[3]).touch(); forks.until(Path(sys.argv[4]).exists)\n"
        "try: edits.COMMANDS[sys.argv[2]](Path(sys.argv[1]))\n"
        "except DemixError as error: print(error); sys.exit(2)\n"
    )
    ready, go = [tmp_path / "ready 0", tmp_path / "ready 1"], tmp_path / "go"
    both = [forks.Forked(program, run, "rename", path, go) for path in ready]
    forks.until(lambda: all(path.exists() for path in ready))
    go.touch()
    said = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (told,) = (text for text, process in zip(said, both, strict=True) if process.returncode)
    assert "is being changed by another process" in told or "has no expert 'law'" in told
    assert edits.restored(run).experts == ("acts", "med", "code")
    verify(run)


def test_receipts_are_numbered_and_say_what_happened(run):
    before = edits.meta_of(run)
    chunks = (edits.step_of(run) / "expert.med").rglob("[0-9]*")
    size = sum(file.stat().st_size for file in chunks)
    add_experts(run, ["copy"], ["law"])
    remove_experts(run, ["med"])
    rename_experts(run, {"law": "acts"})
    paths = sorted((run / "receipts").iterdir())
    names = ["0001-add-copy.json", "0002-remove-med.json", "0003-rename-law.json"]
    assert [path.name for path in paths] == names
    added, removed, renamed = (json.loads(path.read_text()) for path in paths)
    assert (added["state"], removed["state"], renamed["state"]) == ("done",) * 3
    assert added["sources"] == ["law"]
    assert added["dropped"] == {}
    assert set(removed["dropped"]) == {"expert.med", "optimizer.med"}
    expected = {"content_hash": before["hashes"]["expert.med"], "bytes": size}
    assert removed["dropped"]["expert.med"] == expected
    assert removed["scan"]["findings"] == []
    assert removed["older_steps"] == [4]
    assert renamed["renamed"] == {"law": "acts"}
    assert added["after"] == removed["before"]
    assert removed["after"] == renamed["before"]


def test_a_damaged_receipt_is_named(run):
    add_experts(run, ["copy"], ["law"])
    path = run / "receipts" / "0001-add-copy.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(DemixError, match="0001-add-copy.json is damaged"):
        remove_experts(run, ["med"])


def test_runs_without_experts_are_refused(tmp_path):
    for name, variant, message in (
        ("dense", "dense_balanced", "is a dense run"),
        ("young", "demix", "has not branched yet at step 6"),
    ):
        workdir = edits.make_run(tmp_path / name, ("dense",), variant=variant)
        before = edits.files(workdir)
        for command in ("add", "merge", "rename", "remove"):
            with pytest.raises(DemixError, match=message):
                edits.COMMANDS[command](workdir)
        assert edits.files(workdir) == before


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DemixError, match="has no checkpoint yet"):
        add_experts(run, ["copy"], ["law"])
    with pytest.raises(DemixError, match="holds no run"):
        add_experts(tmp_path / "nowhere", ["copy"], ["law"])
    assert not (tmp_path / "nowhere").exists()


def test_what_training_left_when_it_was_killed_goes(run):
    """A step that Orbax had not finished may hold an expert that is to be removed."""
    tmp = run / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(edits.step_of(run), tmp)
    mine = run / "checkpoints" / "backup"
    mine.mkdir()
    (mine / "note.txt").write_text("keep")
    with pytest.raises(DemixError, match="8.orbax-checkpoint-tmp is left of an interrupted"):
        verify(run)
    add_experts(run, ["copy"], ["law"])
    assert not tmp.exists()
    assert (mine / "note.txt").exists()
    verify(run)


def test_priors_follow(run):
    """med had weights .125 .625 .25, law .5 .25 .25 for law, med, code; all by hand."""

    def weights(name: str) -> dict[str, float]:
        from demix_jax.evaluation.cached_priors import load_prior

        found = load_prior(run, name, load_run(run).latest())
        assert (found.name, found.switch_rate, found.uniform_switch_rate) == (name, 0.1, 0.2)
        return dict(zip(found.experts, found.weights, strict=True))

    prior(run, "chat", [0.0, 1.0, 0.0])
    add_experts(run, ["copy"], ["law"])
    assert weights("med") == {"law": 0.125, "med": 0.625, "code": 0.25, "copy": 0.0}
    rename_experts(run, {"law": "acts"})
    assert weights("acts") == {"acts": 0.5, "med": 0.25, "code": 0.25, "copy": 0.0}
    assert weights("med") == {"acts": 0.125, "med": 0.625, "code": 0.25, "copy": 0.0}
    assert sorted(p.name for p in (run / "priors").iterdir()) == [
        "acts.json", "chat.json", "med.json"]  # fmt: skip
    remove_experts(run, ["med"])
    found = weights("acts")
    assert list(found) == ["acts", "code", "copy"]
    np.testing.assert_allclose(list(found.values()), [2 / 3, 1 / 3, 0], rtol=1e-15)
    # med's own prior went with it, and chat's had all of its weight there
    assert [p.name for p in (run / "priors").iterdir()] == ["acts.json"]


def test_priors_of_another_checkpoint_stay_as_they_are(run):
    path = run / "priors" / "old.json"
    old = unseal(json.loads((run / "priors" / "law.json").read_text()))
    path.write_text(json.dumps(old | {"name": "old", "checkpoint": "0" * 16}))
    before = path.read_bytes()
    remove_experts(run, ["med"])
    assert path.read_bytes() == before
