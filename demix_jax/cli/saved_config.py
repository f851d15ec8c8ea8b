"""The configuration of a saved run as config_flags reads it: `saved_config.py:FOLDER/run.json`."""

from pathlib import Path

from demix_jax.config.schema import Config
from demix_jax.config.serialization import read_saved


def get_config(path: str) -> Config:
    """Returns the configuration in a JSON file; see `read_saved`."""
    return read_saved(Path(path))
