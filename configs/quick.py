"""Quick."""

from demix_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    """See the module docstring."""
    return Config(
        model=ModelConfig(layers=4, width=128, heads=4, context=128, unroll=4),
        data=DataConfig(dir="runs/quick/data", vocab_size=4096),
        optim=OptimConfig(learning_rate=2e-3, clip=1.0),
        train=TrainConfig(
            steps=500,
            batch_size=4,
            branch_step=150,
            log_every=20,
            validate_every=0,
            validate_tokens=8192,
            checkpoint_every=250,
        ),
    )
