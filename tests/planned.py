"""Small planned steps on eight simulated devices."""

import dataclasses

import jax

from demix_jax.config.schema import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from demix_jax.planning.hardware import HARDWARE
from demix_jax.planning.planned_step import PlannedStep, lay_out

MODEL = ModelConfig(layers=5, width=32, heads=4, context=24, vocab_size=96, dtype="bfloat16")
NAMES = tuple("abcdefgh")


def config_of(
    mesh: MeshConfig | None = None, variant: str = "demix", batch: int = 16, **model
) -> Config:
    return Config(
        variant=variant,
        model=dataclasses.replace(MODEL, **model),
        data=DataConfig(dir="nothing/here", train_domains=NAMES),
        train=TrainConfig(batch_size=batch, grad_accum_steps=2),
        mesh=mesh or MeshConfig(),
    )


def step_of(config: Config, experts: int = 8) -> PlannedStep:
    return lay_out(config, experts, jax.devices()[:8], HARDWARE["h100"])
