"""Every expert on the same text: one jitted function, vmapped over the groups of devices.

The experts that share a group of devices run one after the other, each by the same program on
arrays of the same shapes. So an expert's scores do not depend, to the last bit, on which other
experts there are (unless matrices are so small, 7 x 12, that the compiler fuses their products),
and activations of one expert at a time are in memory.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from demix_jax.config import ModelConfig
from demix_jax.model import Tree, token_logprobs
from demix_jax.params import Params

Scorer = Callable[[Params, jax.typing.ArrayLike], jax.Array]


def make_scorer(model: ModelConfig, mesh: Mesh) -> Scorer:
    """Returns `score(params, tokens)`: tokens [B, T + 1] int32 -> log-probabilities [D, B, T].

    `params` have the layout of `by_group`, placed by `scoring_sharding`. Nats, float32; entry
    [d, b, t] is expert d's log-probability of tokens[b, t + 1] given those before it. Experts stay
    on their devices of the `domain` axis and text is split over `data`, which B must be a multiple
    of; only log-probabilities leave a device. Bits stay the same on any mesh as long as B over the
    size of `data` does.
    """

    def score(params: Params, tokens: jax.Array) -> jax.Array:
        one = functools.partial(token_logprobs, model, params.shared)
        groups = jax.vmap(one, in_axes=(1, None, None))  # G experts, one in each group

        def run(experts: Tree) -> jax.Array:
            return groups(experts, tokens[:, :-1], tokens[:, 1:])

        found = jax.lax.map(run, params.experts)  # [D/G, G, B, T]
        return found.swapaxes(0, 1).reshape(-1, *found.shape[2:])

    text = NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(score, in_shardings=(scoring_sharding(mesh), text))


def by_group(params: Params, mesh: Mesh) -> Params:
    """The layout of the scorer: experts' leaves [D/G, L, G, ...] instead of [D, L, ...].

    G is the size of the mesh's `domain` axis. Loops over experts and layers take the leading axes,
    so that no call begins with a copy of all experts. On the host this is a view.
    """

    def arrange(leaf: np.ndarray) -> np.ndarray:
        groups = leaf.reshape(mesh.shape["domain"], -1, *leaf.shape[1:])  # [G, D/G, L, ...]
        return groups.transpose(1, 2, 0, *range(3, groups.ndim))

    return params._replace(experts=jax.tree.map(arrange, params.experts))


def scoring_sharding(mesh: Mesh) -> Params:
    """Of parameters with `by_group`: trunk everywhere, experts over `domain`."""
    specs = PartitionSpec(), PartitionSpec(None, None, "domain")
    return Params(*(NamedSharding(mesh, spec) for spec in specs))
