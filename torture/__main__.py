"""Runs a long test by its name: see the package."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from torture import corrupt, fuzz  # noqa: E402

TESTS = {"fuzz": fuzz.main, "corrupt": corrupt.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TESTS:
        sys.exit(f"usage: python -m torture {'|'.join(TESTS)} [--help]")
    sys.exit(0 if TESTS[sys.argv[1]](sys.argv[2:]) else 1)
