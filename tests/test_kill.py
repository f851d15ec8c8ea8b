"""The fast part of `python -m torture kill`: what a killed edit leaves, once it is repeated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_killed_command_that_is_repeated_leaves_what_a_whole_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torture", "kill", "--only", "experts rename", "--kills", "2"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "kills.json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "kills.json").read_text())["cases"]
    assert sum(len(case["kills"]) for case in cases) >= 2
    assert not [case["problem"] for case in cases if case["problem"]]
    assert "| experts rename | work |" in done.stdout
