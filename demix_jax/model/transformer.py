"""The one-domain program: a GPT-2 transformer whose feed-forward blocks arrive as an argument.

Everything here is written for one domain and one expert; other files lift it over domains with
`jax.vmap`. Nothing here knows of meshes, files or names of domains: where devices share the work on
a sequence, a `Cut` says how each brings together what it lacks.

Shape letters: B sequences, T positions, E width, F feed-forward width (4E), H heads, V vocabulary,
L layers, D domains or experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from demix_jax.config.schema import BoundModelConfig, ModelConfig

Tree = Any  # nested dicts of arrays

_INIT_STD = 0.02  # GPT-2


_GATHERS = ("all_gather", "convert_element_type")


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything except what `Cut.whole` brought together, cast or not."""
    return primitive.name not in _GATHERS


_remat_policies = {
    "none": _save_all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelParallel:
    """How a device runs the program with a part of the parameters, or on a part of the positions.

    The default is a device that has everything.

    Attributes:
      whole: brings the leaves of "ends", or of one layer of "layers" or "experts", together.
      join: sums products of the devices that each have some heads or hidden units.
      own: of [B, T, ...], the positions whose logits this device computes.
    """

    whole: Callable[[str, Tree], Tree] = lambda part, leaves: leaves
    join: Callable[[jax.Array], jax.Array] = lambda x: x
    own: Callable[[jax.Array], jax.Array] = lambda x: x


SINGLE_DEVICE = ModelParallel()


class QKVProjection(nnx.Module):
    """Queries, keys and values, `[B, T, E] -> [B, T, 3, E]`, so that heads can be cut."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        linear = _linear(config, config.width, 3 * config.width, _INIT_STD, rngs)
        self.kernel = nnx.Param(linear.kernel[...].reshape(config.width, 3, config.width))
        self.bias = nnx.Param(linear.bias[...].reshape(3, config.width))
        self.dtype = linear.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the matrices at every position."""
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, self.kernel, self.bias))
        return jnp.tensordot(x, kernel, 1) + bias


class RowParallelLinear(nnx.Linear):
    """A matrix whose rows devices may share: their products are joined before the bias is added."""

    def __call__(self, x: jax.Array, join: Callable[[jax.Array], jax.Array] = SINGLE_DEVICE.join):  # type: ignore[no-untyped-def]
        """Applies it at every position."""
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, self.kernel, self.bias))
        return join(x @ kernel) + bias


class Attention(nnx.Module):
    """Causal multi-head self-attention with biases; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.head_width = config.width // config.heads
        self.qkv = QKVProjection(config, rngs=rngs)
        self.out = _linear(
            config, config.width, config.width, _residual_std(config), rngs, RowParallelLinear
        )

    def __call__(
        self, x: jax.Array, visible: jax.Array | None = None, cut: ModelParallel = SINGLE_DEVICE
    ):  # type: ignore[no-untyped-def]
        """Attends from every position to itself and those before it; softmax in float32.

        Where `visible` [B, 1, T, T] is False, the position of the last axis is not attended to.
        """
        qkv = self.qkv(x)  # BT3E, or as many heads of it as the device has
        heads = (*qkv.shape[:2], -1, self.head_width)
        q, k, v = (qkv[:, :, i].reshape(heads) for i in range(3))  # BTHh
        attended = jax.nn.dot_product_attention(q, k, v, mask=visible, is_causal=True)
        return self.out(attended.reshape(*x.shape[:2], -1), cut.join)


class SharedLayer(nnx.Module):
    """What one layer shares between all domains: attention and both layer norms."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = _norm(config, rngs)


class FeedForward(nnx.Module):
    """One layer of one expert: tanh-GELU MLP of width 4E; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.up = _linear(config, config.width, 4 * config.width, _INIT_STD, rngs)
        std = _residual_std(config)
        self.down = _linear(config, 4 * config.width, config.width, std, rngs, RowParallelLinear)

    def __call__(self, x: jax.Array, cut: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Applies the MLP at every position."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True), cut.join)


class Embeddings(nnx.Module):
    """What lies before and after the layers: embeddings (input and output tied), final norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(
            nnx.Embed,
            features=config.width,
            dtype=jnp.dtype(config.dtype),
            embedding_init=nnx.initializers.normal(_INIT_STD),
            rngs=rngs,
        )
        self.tokens = embed(num_embeddings=config.vocab_size)
        self.positions = embed(num_embeddings=config.context)
        self.norm = _norm(config, rngs)


# The dimension, from the last, along which heads or hidden units lie; leaves not named have none.
TENSOR_PARALLEL_DIMS: dict[str, Tree] = {
    "layers": {"attention": {"qkv": {"kernel": -1, "bias": -1}, "out": {"kernel": -2}}},
    "experts": {"up": {"kernel": -1, "bias": -1}, "down": {"kernel": -2}},
}


def hidden_states(
    config: ModelConfig,
    shared: Tree,
    expert: Tree,
    tokens: jax.Array,
    cut: ModelParallel = SINGLE_DEVICE,
) -> jax.Array:
    """Runs trunk and one expert over `tokens` [B, T] int32; returns normed states [B, T, E].

    `shared["ends"]` has been brought together.
    """
    ends = merge(Embeddings, config, shared["ends"])
    x = ends.tokens(tokens)  # BTE
    positions, visible = jnp.arange(tokens.shape[-1]), None
    if config.document_mask:
        positions, visible = separate_documents(config, tokens)
    x = x + ends.positions(positions)

    def layer(x: jax.Array, parts: tuple[Tree, Tree]) -> tuple[jax.Array, None]:
        with jax.named_scope("shared"):
            trunk = merge(SharedLayer, config, cut.whole("layers", parts[0]))
        with jax.named_scope("expert"):
            feed_forward = merge(FeedForward, config, cut.whole("experts", parts[1]))
        with jax.named_scope("attention"):
            x = x + trunk.attention(trunk.attention_norm(x), visible, cut)
        with jax.named_scope("shared"):
            normed = trunk.ffn_norm(x)
        with jax.named_scope("expert"):
            x = x + feed_forward(normed, cut)
        return x, None

    unroll, brings = min(config.unroll, config.layers), cut.whole is not SINGLE_DEVICE.whole
    if config.remat != "none" or brings:  # never keep what was brought here
        layer = jax.checkpoint(layer, policy=_remat_policies[config.remat], prevent_cse=False)
    if brings:  # of unrolled layers, XLA would bring all at once and keep them
        unroll = 1
    x, _ = jax.lax.scan(layer, x, (shared["layers"], expert), unroll=unroll)
    return ends.norm(x)


def separate_documents(config: ModelConfig, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the documents of packed sequences, by the token that begins each.

    A piece of a document that an earlier sequence began is a document of its own. A domain token,
    which only position 0 may hold, belongs to every document, and they count positions from 1.

    Args:
      config: with the ids of its tokenizer.
      tokens: [B, T] int32.

    Returns:
      The position of each token in its document, [B, T] int32, and whether the token of the second
      last axis may see that of the last, [B, 1, T, T] bool; which of them came first is left out.
    """
    if not isinstance(config, BoundModelConfig):
        raise ValueError("document_mask needs the ids of a tokenizer: use BoundModelConfig")
    places = jnp.arange(tokens.shape[-1])
    labelled = tokens[:, :1] >= config.text_ids  # [B, 1]
    first = labelled.astype(places.dtype)
    starts = jax.lax.cummax(jnp.where(tokens == config.eod, places, first), axis=1)  # BT
    same = starts[:, :, None] == starts[:, None, :]
    always = (labelled & (places == 0))[:, None, :]
    return places - starts + first, (same | always)[:, None]


def token_logprobs(
    config: ModelConfig,
    shared: Tree,
    expert: Tree,
    tokens: jax.Array,
    targets: jax.Array,
    cut: ModelParallel = SINGLE_DEVICE,
) -> jax.Array:
    """Log-probability in nats of each target given its prefix.

    Args:
      config: shape and numerics; with `loss_chunk` c, logits exist for c positions at a time.
      shared: the trunk.
      expert: one expert, leaves [L, ...].
      tokens: inputs [B, T] int32.
      targets: what follows each input, [B, T] int32.
      cut: what of it this device has.

    Returns:
      [B, T] float32; of the positions that are the device's own.
    """
    with jax.named_scope("shared"):
        shared = shared | {"ends": cut.whole("ends", shared["ends"])}
    states = cut.own(hidden_states(config, shared, expert, tokens, cut))
    targets = cut.own(targets)
    table = shared["ends"]["tokens"]["embedding"].astype(states.dtype)

    def score(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, targets = pair
        logits = jnp.einsum("bte,ve->btv", states, table, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    with jax.named_scope("logprobs"):
        chunk = config.loss_chunk
        if not chunk or chunk >= targets.shape[1]:
            return score((states, targets))
        pairs = jax.tree.map(lambda x: _chunks(x, chunk), (states, targets))
        logprobs = jax.lax.map(jax.checkpoint(score, prevent_cse=False), pairs)  # [T/c, B, c]
        return jnp.moveaxis(logprobs, 0, 1).reshape(targets.shape)


def init_trunk(config: ModelConfig, key: jax.Array) -> Tree:
    """Fresh shared parameters: `ends` and `layers`, the latter with leaves [L, ...]."""
    ends_key, layers_key = jax.random.split(key)
    return {
        "ends": _init(Embeddings, config, ends_key),
        "layers": _init_layers(SharedLayer, config, layers_key),
    }


def init_expert(config: ModelConfig, key: jax.Array) -> Tree:
    """Fresh parameters of one expert, leaves [L, ...]."""
    return _init_layers(FeedForward, config, key)


def merge(module: type[nnx.Module], config: ModelConfig, parameters: Tree) -> Any:
    """The module of type `module` that holds `parameters`."""
    return nnx.merge(_graphdef(module, config), parameters)


@functools.lru_cache
def _graphdef(module: type[nnx.Module], config: ModelConfig) -> nnx.GraphDef:
    abstract = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))  # type: ignore[call-arg]
    return nnx.split(abstract)[0]


def _init(module: type[nnx.Module], config: ModelConfig, key: jax.Array) -> Tree:
    return nnx.to_pure_dict(nnx.state(module(config, rngs=nnx.Rngs(key)), nnx.Param))  # type: ignore[call-arg]


def _init_layers(module: type[nnx.Module], config: ModelConfig, key: jax.Array) -> Tree:
    keys = jax.random.split(key, config.layers)
    return jax.vmap(lambda key: _init(module, config, key))(keys)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [T / size, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _linear(
    config: ModelConfig,
    inputs: int,
    outputs: int,
    std: float,
    rngs: nnx.Rngs,
    kind: type[nnx.Linear] = nnx.Linear,
) -> Any:
    init = nnx.initializers.normal(std)
    return kind(inputs, outputs, dtype=jnp.dtype(config.dtype), kernel_init=init, rngs=rngs)


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.width,
        epsilon=1e-5,
        dtype=jnp.dtype(config.dtype),
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits
        rngs=rngs,
    )


def _residual_std(config: ModelConfig) -> float:
    """GPT-2 shrinks what is added to the residual stream by the number of additions, 2L."""
    return _INIT_STD / math.sqrt(2 * config.layers)
