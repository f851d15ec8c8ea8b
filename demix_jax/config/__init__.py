"""Every field of an experiment, as typed dataclasses that are saved with the run."""

from demix_jax.config.schema import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = ["Config", "DataConfig", "MeshConfig", "ModelConfig", "OptimConfig", "TrainConfig"]
