"""The paper's 350M model: 350M dense, 1.8B with 8 experts (Gururangan et al. 2021, section 3).

    demix prepare --config configs/paper_data.py --config.data.tokenizer=GPT2/tokenizer.json
    demix train   --config configs/paper_350m.py --workdir runs/350m/demix ...

120,000 updates of 1,048,576 tokens (16,384 on each of 64 GPUs): 128 sequences of 1,024
tokens from each of 8 domains. `--config.variant` dense, dense_balanced and
domain_token are the paper's baselines. The domains are those of `paper_data.py`. Not run by
this project.
"""

from demix_jax.config import Config, DataConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    """Returns the experiment described above."""
    return Config(
        model=ModelConfig(
            layers=24,
            width=1024,
            heads=16,
            context=1024,
            vocab_size=50_257,
            dtype="bfloat16",
            remat="dots",
            logits_chunk=128,
        ),
        data=DataConfig(dir="runs/paper/data", tokenizer="tokenizer.json"),
        train=TrainConfig(
            steps=120_000,
            batch_size=128,
            log_every=100,
            validate_every=5000,
            validate_tokens=1_048_576,
            checkpoint_every=1000,
        ),
    )
