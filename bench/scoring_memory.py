"""Memory of the all-expert scorer at the paper's sizes, from the compiler; nothing is allocated.

python bench/scoring_memory.py [--sequences 4]
"""

import argparse

import jax
import jax.numpy as jnp

from demix_jax.config.schema import MeshConfig, ModelConfig
from demix_jax.evaluation.scorer import by_group, make_scorer
from demix_jax.model.params import count, init_params
from demix_jax.parallel.mesh import make_mesh

SIZES = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    "1.3B": (24, 2048, 32),
}


def main() -> None:
    """Prints a row per size: parameters, what the program adds to them, and the naive logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=4, help="sequences scored at once")
    experts, batch, context, vocab = 8, parser.parse_args().sequences, 1024, 50_257
    mesh = make_mesh(MeshConfig(), experts, jax.devices()[:1])
    print(f"{experts} experts, {batch} x {context} tokens, vocabulary {vocab}, float32 compute, GB")
    print(f"{'':6}{'float32 parameters':>20}{'arguments':>12}{'beside them':>14}{'all logits':>12}")
    for name, (layers, width, heads) in SIZES.items():
        model = ModelConfig(
            layers=layers,
            width=width,
            heads=heads,
            context=context,
            vocab_size=vocab,
            dtype="float32",
            logits_chunk=64,
        )
        params = jax.eval_shape(
            lambda model=model: by_group(init_params(model, jax.random.key(0), experts), mesh)
        )
        tokens = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
        scorer = make_scorer(model, mesh)
        memory = scorer.lower(params, tokens).compile().memory_analysis()  # type: ignore[attr-defined]
        size = 4 * (count(params.shared) + count(params.experts))
        logits = 4 * experts * batch * context * vocab
        numbers = (size, memory.argument_size_in_bytes, memory.temp_size_in_bytes, logits)
        print(
            f"{name:6}"
            + "".join(f"{n / 1e9:{w}.2f}" for n, w in zip(numbers, (20, 12, 14, 12), strict=True))
        )


if __name__ == "__main__":
    main()
