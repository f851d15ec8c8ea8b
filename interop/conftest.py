"""What every test of this folder runs under: the devices of `tests/`, and no network.

These tests compare the library with others: `make interop` has them in an environment of its own.
Helpers of `tests/` (`tiny`, `edits`, `jobs`) are imported by name.
"""

import os

import jax_setup  # noqa: F401

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
