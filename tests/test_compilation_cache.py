"""Compiled programs on disk: found again, bounded, mended when damaged, never in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demix_jax.cli.compilation_cache import OFF, use_compilation_cache

ROOT = Path(__file__).parent.parent
# Compiles a number of programs, and prints how many were found on disk and how many were not.
PROGRAM = """
import collections, sys
from demix_jax.cli.compilation_cache import use_compilation_cache
use_compilation_cache(None)
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **more: counts.update([name.split("/")[-1]]))
for n in range(int(sys.argv[1])):
    jax.jit(lambda x: (x * 2).sum())(jax.numpy.ones(n + 2))
print(counts["cache_hits"], counts["compile_requests_use_cache"])
"""


def start(home: Path, programs: int = 1, **variables: str) -> subprocess.Popen:
    environment = {name: text for name, text in os.environ.items() if "CACHE" not in name}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables
    command = [sys.executable, "-c", PROGRAM, str(programs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def counts(process: subprocess.Popen) -> tuple[int, int]:
    """Programs found and programs asked for, by a process that had nothing to say."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    hits, asked = map(int, out.split())
    return hits, asked


def entries(home: Path) -> dict[str, bytes]:
    (folder,) = (home / "demix_jax" / "xla").iterdir()  # one for each kind of processor
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*-cache"))}


@pytest.mark.slow
def test_programs_are_found_again_also_after_damage(tmp_path):
    for process in [start(tmp_path), start(tmp_path)]:  # side by side
        counts(process)
    written = entries(tmp_path)
    hits, asked = counts(start(tmp_path))
    assert hits == asked == len(written) > 0

    (folder,) = (tmp_path / "demix_jax" / "xla").iterdir()
    for name, content in written.items():  # as processes leave them that are killed
        (folder / name).write_bytes(content[: len(content) // 2])
        (folder / name.replace("-cache", "-atime")).unlink()
    assert counts(start(tmp_path)) == (0, asked)
    assert entries(tmp_path).keys() == written.keys()
    assert counts(start(tmp_path)) == (asked, asked)


@pytest.mark.slow
def test_the_folder_is_bounded(tmp_path):
    limit = 12_000
    counts(start(tmp_path, programs=6, JAX_COMPILATION_CACHE_MAX_SIZE=str(limit)))
    sizes = [len(content) for content in entries(tmp_path).values()]
    assert 0 < sum(sizes) <= limit
    assert len(sizes) < 6


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "demix_jax", "config", "--config=quick"]
        + [f"--compilation_cache={tmp_path}/file/xla"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: {tmp_path}/file/xla/")
    assert line.endswith(" cannot be written (Not a directory): compiled programs are not kept")
    assert "model.layers" in done.stdout


def test_it_can_be_switched_off_and_jax_s_own_variables_count(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    before = dict(os.environ)
    use_compilation_cache(None)
    assert dict(os.environ) == before
    use_compilation_cache(OFF)
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert not (tmp_path / "own").exists()
