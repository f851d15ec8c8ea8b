"""A small model of the Llama kind on two CPU cores, with text that every machine has.

    demix prepare --config configs/llama_small.py
    demix train   --config configs/llama_small.py --workdir runs/llama_small/demix

RMS norms, rotary positions, SwiGLU, two heads of keys for four of queries, no biases, and an
unembedding of its own: 4 x 128 with 344 hidden units, on the text of `quick.py`, half as long. On 2
cores of a shared x86-64 machine under other load (2026-11-28): 3 minutes of processor time, 4.43
nats/token at the end (macro average, known expert, 8,192 validation tokens of each domain).
"""

from demix_jax.config import Config, DataConfig, OptimConfig, TrainConfig
from demix_jax.config.families import preset


def get_config() -> Config:
    """Returns the experiment described above."""
    shape = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "hidden": 344, "context": 128}
    return Config(
        model=preset("llama", **shape, scan_unroll=4),
        data=DataConfig(dir="runs/quick/data", vocab_size=4096),
        optim=OptimConfig(learning_rate=2e-3, clip=1.0),
        train=TrainConfig(
            steps=200,
            batch_size=4,
            branch_step=60,
            log_every=20,
            validate_every=0,
            validate_tokens=8192,
            checkpoint_every=100,
        ),
    )
