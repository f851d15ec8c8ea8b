"""One GPU: an 8 x 256 model (11M dense, 40M with 8 experts) on a folder of domains.

    demix prepare --config configs/small.py --config.data.sources=FOLDER
    demix train   --config configs/small.py --config.data.sources=FOLDER --workdir runs/small/demix

FOLDER holds one `<domain>.jsonl[.gz|.zst]` or `<domain>/` of text files per domain. The baseline is
the same command with `--config.variant=dense_balanced`. 131,072 tokens an update with 8 domains,
131M tokens in all; the first 30 % train one feed-forward stack, which then becomes the experts.
Not measured yet: no GPU was at hand when this was written.
"""

from demix_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    """Returns the experiment described above."""
    return Config(
        model=ModelConfig(layers=8, width=256, heads=8, context=512, dtype="bfloat16"),
        data=DataConfig(dir="runs/small/data", vocab_size=16_384),
        optim=OptimConfig(learning_rate=1e-3, clip=1.0),
        train=TrainConfig(
            steps=1000,
            batch_size=32,
            branch_step=300,
            validate_every=200,
            checkpoint_every=200,
        ),
    )
