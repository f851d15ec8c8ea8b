"""A `demix serve` process for tests."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def serving(workdir: Path, *flags: str, seconds: float = 120) -> Iterator[str]:
    """Yields the address of a server; when the block is left, it must end without a complaint."""
    command = [sys.executable, "-m", "demix_jax", "serve", f"--workdir={workdir}", "--port=0"]
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        yield _address(process, said, seconds)
    finally:
        process.terminate()
        try:
            status = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        reader.join(5)
    assert status == 0, "".join(said)
    assert "Traceback" not in "".join(said), "".join(said)


def _address(process: subprocess.Popen, said: list[str], seconds: float) -> str:
    """Waits for the line with the address, and for the first answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        for line in said:
            if found := re.match(r"(http://\S+:\d+)$", line.strip()):
                with urllib.request.urlopen(f"{found[1]}/health", timeout=60) as answer:
                    assert json.load(answer)["status"] == "ok"
                return found[1]
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the server did not start: {''.join(said)}")
