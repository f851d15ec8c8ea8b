"""Every expert on the same text: one jitted function, vmapped over experts."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.config import ModelConfig
from demix_jax.model import token_logprobs
from demix_jax.params import Params
from demix_jax.sharding import params_sharding

Scorer = Callable[[Params, jax.typing.ArrayLike], jax.Array]


def make_scorer(model: ModelConfig, mesh: Mesh, num_experts: int) -> Scorer:
    """Returns `score(params, tokens)`: tokens [B, T + 1] int32 -> log-probabilities [D, B, T].

    `params` have the layout of `layers_first`, placed by `scoring_sharding`.
    Nats, float32; entry [d, b, t] is expert d's log-probability of tokens[b, t + 1] given those
    before it. Experts stay on their devices of the `domain` axis and text is split over `data`,
    which B must be a multiple of; only log-probabilities leave a device.
    """

    def score(params: Params, tokens: jax.Array) -> jax.Array:
        one = functools.partial(token_logprobs, model, params.shared)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return jax.vmap(one, in_axes=(1, None, None))(params.experts, inputs, targets)

    text = NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(score, in_shardings=(scoring_sharding(mesh, num_experts), text))


def layers_first(params: Params) -> Params:
    """The layout of the scorer: experts' leaves [L, D, ...] instead of [D, L, ...].

    Vmapping the scan over layers needs the layer axis first; given it last, every call would begin
    with a copy of all experts. On the host this is a view.
    """
    return params._replace(experts=jax.tree.map(lambda x: x.swapaxes(0, 1), params.experts))


def scoring_sharding(mesh: Mesh, num_experts: int) -> Params:
    """Of parameters with `layers_first`: trunk everywhere, experts over `domain`."""
    shared, experts = params_sharding(mesh, num_experts)
    return Params(shared, NamedSharding(mesh, PartitionSpec(None, *experts.spec)))
