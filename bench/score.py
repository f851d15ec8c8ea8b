"""Scoring with all experts against one, and against whole PyTorch models in turn, suite `score`.

Our programs share one process; PyTorch runs in its own. Memory is that of parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import measure
from bench.measure import Row, Worker
from bench.train import torch_python
from demix_jax.config.schema import MeshConfig, ModelConfig
from demix_jax.evaluation.scorer import by_group, make_scorer, scoring_sharding
from demix_jax.mixing.stream import make_stream, mix_tokens
from demix_jax.model.modules import Embeddings, Layer, merge
from demix_jax.model.params import Params, count, init_params, join
from demix_jax.parallel.mesh import make_mesh

EXPERTS = 8
SHAPE: Row = {"layers": 4, "width": 128, "heads": 2, "vocab": 8192, "context": 256, "sequences": 8}
TINY: Row = {"layers": 2, "width": 16, "heads": 2, "vocab": 64, "context": 16, "sequences": 2}
AIMS = {"all 8 experts": 6.2, "2 of 8 experts": 1.9}  # times one expert
LONGER = 8  # times the tokens: the filter's time must grow as they do


def run(rounds: int, *, quick: bool = False) -> list[Row]:
    """Measures one expert, two, all, what they share, the mixture, the filter, and PyTorch."""
    shape = TINY if quick else SHAPE
    params, calls = _our_calls(shape)
    counts = [shape["context"] * 32 * times for times in (1, LONGER)]
    short, long = (f"filter of {count:,} tokens" for count in counts)
    calls |= {short: _filter(counts[0]), long: _filter(counts[1])}
    worker = None
    if python := torch_python():
        settings = shape | {"kind": "score", "models": EXPERTS, "compile": not quick}
        worker = Worker("bench.peers", settings, python=python)
        calls["8 PyTorch models in turn"] = lambda: worker()["seconds"]
    median = measure.medians(measure.interleave(calls, rounds, warmup=2))
    ours = 4 * (count(params.shared) + count(params.experts)) / 1e6
    memory = {"all 8 experts": ours}
    if worker:
        memory["8 PyTorch models in turn"] = worker()["parameters_mb"]
        worker.close()
    theirs = median.get("8 PyTorch models in turn")
    return [
        {
            "program": name,
            "ms": 1e3 * seconds,
            "x one expert": seconds / median["one expert"],
            "aim": AIMS.get(name),
            "of all 8": seconds / median["all 8 experts"],
            "time / (8 x shorter)": seconds / (LONGER * median[short]) if name == long else None,
            "speed x PyTorch": theirs / seconds if theirs and name == "all 8 experts" else None,
            "parameters, MB": memory.get(name),
        }
        for name, seconds in median.items()
    ]


def _our_calls(shape: Row) -> tuple[Params, dict[str, Callable[[], Any]]]:
    model = ModelConfig(
        layers=shape["layers"],
        width=shape["width"],
        heads=shape["heads"],
        context=shape["context"],
        vocab_size=shape["vocab"],
        scan_unroll=shape["layers"],
    )
    params = init_params(model, jax.random.key(0), EXPERTS)
    size = (shape["sequences"], shape["context"] + 1)
    tokens = np.random.default_rng(0).integers(0, shape["vocab"], size, np.int32)
    calls = {
        label: _scoring(model, params, experts, tokens)
        for label, experts in (("one expert", 1), ("2 of 8 experts", 2), ("all 8 experts", 8))
    }
    calls["what experts share, of one"] = _shared_work(model, params, tokens)
    logprobs = np.asarray(calls["all 8 experts"]())
    stream = make_stream(tokens, np.ones(logprobs.shape[1:], bool), logprobs, eod=0)
    prior = np.full(EXPERTS, 1 / EXPERTS)
    calls["posterior and mixture, on top"] = lambda: mix_tokens(stream, prior, 0.0) and None
    return params, calls


def _shared_work(model: ModelConfig, params: Params, tokens: np.ndarray) -> Callable[[], Any]:
    """Returns a call of what is the same for all experts: embeddings and the first attention.

    The compiler takes it out of the loop over experts, so that a text's is computed once.
    """

    @jax.jit
    def attended(params: Params, tokens: jax.Array) -> jax.Array:
        tree = join(params.shared, jax.tree.map(lambda leaf: leaf[0], params.experts))
        x = merge(Embeddings, model, tree["embed"])(tokens, jnp.arange(tokens.shape[1]))
        layer = merge(Layer, model, jax.tree.map(lambda leaf: leaf[0], tree["layers"]))
        return x + layer.attention(layer.attention_norm(x))[0]

    text = jnp.asarray(tokens[:, :-1])
    return lambda: jax.block_until_ready(attended(params, text))


def _filter(count: int) -> Callable[[], None]:
    """Returns a call that mixes a stream of so many tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 99, (1, count + 1), np.int32)
    logprobs = rng.normal(size=(EXPERTS, 1, count)).astype(np.float32)
    stream = make_stream(tokens, np.ones((1, count), bool), logprobs, eod=0)
    return lambda: mix_tokens(stream, np.full(EXPERTS, 1 / EXPERTS), 0.0) and None


def _scoring(model: ModelConfig, params: Params, experts: int, tokens: np.ndarray) -> Callable:
    mesh = make_mesh(MeshConfig(), experts, jax.devices()[:1])
    some = params._replace(experts=jax.tree.map(lambda x: x[:experts], params.experts))
    placed = jax.device_put(by_group(some, mesh), scoring_sharding(model, mesh))
    scorer, text = make_scorer(model, mesh), jnp.asarray(tokens)
    return lambda: jax.block_until_ready(scorer(placed, text))
