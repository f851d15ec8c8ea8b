"""Suites of benchmarks, with PyTorch beside them."""

import subprocess
import sys
from pathlib import Path

from bench import measure

ROOT = Path(__file__).parent.parent


def test_suites_run_on_tiny_shapes(tmp_path):
    suites = ("train", "score", "gpu")
    command = [sys.executable, "-m", "bench", "--quick", f"--suite={','.join(suites)}"]
    done = subprocess.run([*command, f"--out={tmp_path}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for suite in suites:
        result = measure.load(tmp_path / f"{suite}.json")
        assert result.environment["command"].startswith("python -m bench --quick")
        assert measure.to_markdown(result) in done.stdout
        assert len(result.rows) >= 2
