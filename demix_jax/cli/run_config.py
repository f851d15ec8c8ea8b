"""The configuration of a run, as a file that --config reads with the run's folder behind it."""

from pathlib import Path

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import Config


def get_config(workdir: str) -> Config:
    """Returns the configuration of the run in `workdir`; raises DemixError when there is none."""
    return load_run(Path(workdir)).config
