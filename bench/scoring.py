"""What scoring with all experts costs, against scoring with one (docs/benchmarks.md).

    python bench/scoring.py [--layers 4 --width 128 --vocab 8192 --context 256 --batch 8]

Times one expert, all D and the top 2 on the same text, interleaved in one process, medians of
rounds; the mixture on top of the log-probabilities; and the memory that the parameters take.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from demix_jax.config.schema import MeshConfig, ModelConfig
from demix_jax.evaluation.scorer import by_group, make_scorer, scoring_sharding
from demix_jax.mixing.stream import make_stream, mix_tokens
from demix_jax.model.params import Params, count, init_params
from demix_jax.parallel.mesh import make_mesh


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("layers", 4), ("width", 128), ("vocab", 8192), ("context", 256), ("batch", 8),
        ("experts", 8), ("rounds", 15),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model = ModelConfig(
        layers=given.layers,
        width=given.width,
        heads=max(1, given.width // 64),
        context=given.context,
        vocab_size=given.vocab,
        dtype=given.dtype,
        scan_unroll=given.layers,
        logits_chunk=min(128, given.context),
    )
    device = jax.devices()[0]
    before = _bytes_in_use(device)
    params = init_params(model, jax.random.key(0), given.experts)
    tokens = np.random.default_rng(0).integers(0, given.vocab, (given.batch, given.context + 1))
    calls = {f"{k} experts": _call(model, params, k, tokens) for k in (1, 2, given.experts)}
    logprobs = np.asarray(calls[f"{given.experts} experts"]())
    mask = np.ones((given.batch, given.context), bool)
    stream = make_stream(tokens, mask, logprobs, eod=0)
    prior = np.full(given.experts, 1 / given.experts)
    calls["posterior and mixture"] = lambda: mix_tokens(stream, prior, 0.0)
    medians = _medians(calls, given.rounds)
    one = medians["1 experts"]
    print(f"{device.device_kind}, {model.layers} x {model.width}, vocabulary {model.vocab_size}, ")
    print(
        f"{given.batch} x {given.context} tokens, {given.dtype}, medians of {given.rounds} rounds"
    )
    for name, seconds in medians.items():
        print(f"{name:24} {seconds * 1e3:10.2f} ms   {seconds / one:6.2f} x one expert")
    share = medians["posterior and mixture"] / medians[f"{given.experts} experts"]
    print(f"posterior and mixture take {share:.2%} of scoring with all experts")
    expected = 4 * (count(params.shared) + count(params.experts))
    print(f"trunk + {given.experts} experts: {expected / 1e6:.1f} MB of float32 parameters")
    if before is not None:
        print(f"device memory for parameters: {(_bytes_in_use(device) or 0) - before:,} bytes")


def _call(model: ModelConfig, params: Params, experts: int, tokens: np.ndarray) -> Callable:
    mesh = make_mesh(MeshConfig(), experts, jax.devices()[:1])
    some = params._replace(experts=jax.tree.map(lambda x: x[:experts], params.experts))
    placed = jax.device_put(by_group(some, mesh), scoring_sharding(model, mesh))
    scorer, text = make_scorer(model, mesh), jnp.asarray(tokens, jnp.int32)
    return lambda: jax.block_until_ready(scorer(placed, text))


def _medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:  # the first compile
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _bytes_in_use(device: jax.Device) -> int | None:
    stats = device.memory_stats()
    return stats["bytes_in_use"] if stats else None


if __name__ == "__main__":
    main()
