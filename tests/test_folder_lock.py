"""One owner of a folder: who it is, and what becomes of its lock when it dies or is far away."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from demix_jax.errors import DemixError
from demix_jax.folder_lock import lock_folder
from demix_jax.training.train import train

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from demix_jax.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "demix train"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen]:
    """Runs a process that holds the lock of a folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert any(line == "held\n" for line in process.stdout)  # maybe after another line
            yield process
        finally:
            process.kill()


def refusal(folder: Path) -> str:
    with pytest.raises(DemixError) as caught, lock_folder(folder, "demix experts add x"):
        pass
    return str(caught.value)


def note(folder: Path, **changes: object) -> None:
    """Changes what is noted of the holder."""
    path = folder / "lock.holder"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_who_is_refused_is_told_who_has_it(tmp_path):
    with holding(tmp_path) as process:
        said = refusal(tmp_path)
        who = rf"demix train, process {process.pid} on {re.escape(socket.gethostname())} since 2"
        assert re.search(rf"{who}\d\d\d-\d\d-\d\d .* UTC\); wait until it has ended", said), said
        with pytest.raises(DemixError, match=who):  # two trainers
            train(tiny.config(tiny.write_prepared(tmp_path / "data", ["law", "med"])), tmp_path)
        assert not (tmp_path / "run.json").exists()
    assert "names it; wait" in _unnoted(tmp_path)


def _unnoted(folder: Path) -> str:
    with holding(folder):
        (folder / "lock.holder").write_bytes(b'{"command": "dem')
        return refusal(folder)


def test_the_lock_of_a_killed_process_is_free_and_said_to_be_so(tmp_path, capsys):
    with holding(tmp_path) as process:
        process.kill()
        process.wait()
        with lock_folder(tmp_path, "demix train"):
            said = capsys.readouterr().out
            assert f"demix train, process {process.pid} on " in said
            assert said.endswith("was killed; its lock is taken over\n")
    with lock_folder(tmp_path, "demix train"):
        assert not capsys.readouterr().out  # it was given back


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path, capsys):
    with holding(tmp_path):
        note(tmp_path, process=os.getpid())  # which runs, but began at another time
        assert "is not to be seen from here; one in another container" in refusal(tmp_path)


def test_of_another_host_it_is_said_what_is_known_and_what_to_do(tmp_path, capsys):
    with holding(tmp_path):
        note(tmp_path, host="elsewhere")
        said = refusal(tmp_path)
        assert "on elsewhere since" in said
        assert "cannot be seen from" in said
        assert "delete" in said
        left = (tmp_path / "lock.holder").read_text()
    (tmp_path / "lock.holder").write_text(left)
    with lock_folder(tmp_path, "demix train"):
        assert "if it still runs, end one of the two" in capsys.readouterr().out
