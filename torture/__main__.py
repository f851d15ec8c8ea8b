"""Runs a long test by its name: see the package."""

import importlib
import os
import sys

TESTS = ("fuzz", "corrupt", "power", "kill", "resources", "soak")

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if len(sys.argv) < 2 or sys.argv[1] not in TESTS:
        sys.exit(f"usage: python -m torture {'|'.join(TESTS)} [--help]")
    # No earlier: `--guided` watches the modules that it imports itself.
    test = importlib.import_module(f"torture.{sys.argv[1]}")
    sys.exit(0 if test.main(sys.argv[2:]) else 1)
