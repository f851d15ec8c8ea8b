"""Every benchmark starts and says what it takes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path.name for path in (ROOT / "bench").glob("*.py") if "ArgumentParser" in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_answers_help(script):
    command = [sys.executable, "-m", f"bench.{script.removesuffix('.py')}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
