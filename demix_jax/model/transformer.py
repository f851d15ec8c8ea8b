"""The one-domain program: a GPT-2 transformer over one full tree of parameters.

    embed   tokens, positions           [V, E], [C, E]; the tokens' table is the unembedding too
    layers  attention_norm, attention, ffn_norm, ffn     every leaf [L, ...]
    norm                                the final norm
    unembed bias                        [V], only if the model has an output bias

Everything here is written for one domain and knows nothing of experts, meshes or files: `params.py`
says which leaves of the tree an expert owns, other files lift the program over experts with
`jax.vmap`, and where devices share a layer's work a `ModelParallel` brings the collectives.

Shape letters: B sequences, T positions, C context, E width, F feed-forward width, H heads,
V vocabulary, L layers, D domains or experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from demix_jax.config.schema import BoundModelConfig, ModelConfig
from demix_jax.model.kv_cache import KVCache, append, init_cache, read_on

Tree = Any  # nested dicts of arrays
KeysValues = tuple[jax.Array, jax.Array]

_INIT_STD = 0.02  # GPT-2
_GATHERS = ("all_gather", "convert_element_type")


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything for the backward pass except gathered parameters, cast or not."""
    return primitive.name not in _GATHERS


_remat_policies = {
    "none": _save_all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelParallel:
    """Collectives that the model calls under tensor parallelism or FSDP.

    The default, `SINGLE_DEVICE`, is for a device that has all parameters and all positions.

    Attributes:
      all_gather: function of a name and a tree that gathers the sharded leaves of "embed" or
        "norm", or of one layer of "layers".
      psum: function that sums the partial products of devices that share heads or hidden units.
      local_positions: function of [B, T, ...] that takes the positions whose logits this device
        computes.
    """

    all_gather: Callable[[str, Tree], Tree] = lambda name, leaves: leaves
    psum: Callable[[jax.Array], jax.Array] = lambda x: x
    local_positions: Callable[[jax.Array], jax.Array] = lambda x: x


SINGLE_DEVICE = ModelParallel()


class QKVProjection(nnx.Module):
    """Queries, keys and values, `[B, T, E] -> [B, T, 3, E]`, so that heads can be sharded."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        linear = _linear(config, config.width, 3 * config.width, _INIT_STD, rngs)
        self.kernel = nnx.Param(linear.kernel[...].reshape(config.width, 3, config.width))
        self.bias = nnx.Param(linear.bias[...].reshape(3, config.width))
        self.dtype = linear.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the three matrices at every position."""
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, self.kernel, self.bias))
        return jnp.tensordot(x, kernel, 1) + bias


class RowParallelLinear(nnx.Linear):
    """A matrix whose rows may be sharded: products are summed before the bias is added."""

    def __call__(self, x: jax.Array, parallel: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Applies the matrix at every position."""
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, self.kernel, self.bias))
        return parallel.psum(x @ kernel) + bias


class Attention(nnx.Module):
    """Causal multi-head self-attention with biases; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.head_width = config.width // config.heads
        self.qkv = QKVProjection(config, rngs=rngs)
        std = _residual_std(config)
        self.out = _linear(config, config.width, config.width, std, rngs, RowParallelLinear)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        parallel: ModelParallel = SINGLE_DEVICE,
        past: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Attends from every position to itself and those before it; softmax in float32.

        Where `mask` [B, 1, T, T] is False, the position of the last axis is not attended to. With
        keys and values of a `past` [B, S, H, h], the mask is [B, 1, T, S + T] and says all.

        Returns:
          The sum to add to the residual stream, and the keys and values [B, T, H, h].
        """
        qkv = self.qkv(x)  # BT3E, or as many heads of it as the device has
        heads = (*qkv.shape[:2], -1, self.head_width)
        q, k, v = (qkv[:, :, i].reshape(heads) for i in range(3))  # BTHh
        keys, values = k, v
        if past is not None:
            keys, values = (
                jnp.concatenate(pair, axis=1) for pair in zip(past, (k, v), strict=True)
            )
        attended = jax.nn.dot_product_attention(q, keys, values, mask=mask, is_causal=past is None)
        return self.out(attended.reshape(*x.shape[:2], -1), parallel), (k, v)


class FeedForward(nnx.Module):
    """Tanh-GELU MLP of width F; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, std = config.ffn_width, _residual_std(config)
        self.up = _linear(config, config.width, hidden, _INIT_STD, rngs)
        self.down = _linear(config, hidden, config.width, std, rngs, RowParallelLinear)

    def __call__(self, x: jax.Array, parallel: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Applies the MLP at every position."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True), parallel)


class Layer(nnx.Module):
    """Pre-norm transformer layer; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, ffn_rngs: nnx.Rngs | None = None):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = _norm(config, rngs)
        self.ffn = FeedForward(config, rngs=ffn_rngs or rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        parallel: ModelParallel,
        past: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Adds attention and the feed-forward block to the residual stream; see `Attention`."""
        with jax.named_scope("attention"):
            attended, new = self.attention(self.attention_norm(x), mask, parallel, past)
            x = x + attended
        with jax.named_scope("ffn_norm"):
            normed = self.ffn_norm(x)
        with jax.named_scope("ffn"):
            return x + self.ffn(normed, parallel), new


class Embeddings(nnx.Module):
    """Token and position tables; `[B, T] int32 -> [B, T, E]`."""

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

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Sums the embeddings of tokens [B, T] and of positions [T] or [B, T]."""
        return self.tokens(tokens) + self.positions(positions)


class OutputBias(nnx.Module):
    """A bias of the logits; `[..., V] float32 -> [..., V]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        del rngs
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))
        self.scale = config.output_bias_scale

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Adds the scaled bias."""
        return logits + self.scale * self.bias[...]


# The dimension, counted from the last, along which the heads or hidden units of a leaf lie, by path
# of the tree; tensor parallelism shards it. Leaves that are not named have none.
TENSOR_PARALLEL_DIMS: Tree = {
    "layers": {
        "attention": {"qkv": {"kernel": -1, "bias": -1}, "out": {"kernel": -2}},
        "ffn": {"up": {"kernel": -1, "bias": -1}, "down": {"kernel": -2}},
    }
}


def hidden_states(
    config: ModelConfig, tree: Tree, tokens: jax.Array, parallel: ModelParallel = SINGLE_DEVICE
) -> jax.Array:
    """Runs the layers over `tokens` [B, T] int32; returns normed states [B, T, E].

    The leaves of `tree["embed"]` have been gathered already.
    """
    positions, mask = jnp.arange(tokens.shape[-1]), None
    if config.document_mask:
        positions, mask = separate_documents(config, tokens)
    return _run_layers(config, tree, tokens, positions, mask, parallel)[0]


def extend(
    config: BoundModelConfig, tree: Tree, cache: KVCache, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Reads on: `hidden_states` of new tokens behind the text of a cache.

    Args:
      config: shape and numerics.
      tree: full parameter tree of the domain whose cache it is.
      cache: text that was read, with S slots, or with none if there is no text yet.
      tokens: new tokens [B, T] int32, padded on the right.
      count: [B] int32, the number of new tokens of each row, from 0 to T.

    Returns:
      Normed states [B, T, E], and the cache with the new tokens (with T slots if it had none).
    """
    reading = read_on(config, cache, tokens)
    past = cache.keys, cache.values
    states, new = _run_layers(config, tree, tokens, reading.positions, reading.mask, past=past)
    assert new is not None
    if not cache.keys.shape[2]:
        cache = init_cache(config, *tokens.shape)
    return states, append(cache, reading, new, count)


def _run_layers(
    config: ModelConfig,
    tree: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array | None,
    parallel: ModelParallel = SINGLE_DEVICE,
    past: KeysValues | None = None,
) -> tuple[jax.Array, KeysValues | None]:
    """Returns normed states [B, T, E]; with a `past` [L, B, S, H, h], new keys and values too."""
    with jax.named_scope("embed"):
        x = merge(Embeddings, config, tree["embed"])(tokens, positions)  # BTE

    def layer(x: jax.Array, each: tuple[Tree, KeysValues | None]) -> tuple[jax.Array, Any]:
        leaves, past = each
        gathered = parallel.all_gather("layers", leaves)
        x, new = merge(Layer, config, gathered)(x, mask, parallel, past)
        return x, None if past is None else new

    unroll = min(config.scan_unroll, config.layers)
    gathers = parallel.all_gather is not SINGLE_DEVICE.all_gather
    if config.remat != "none" or gathers:  # never keep what was gathered here
        layer = jax.checkpoint(layer, policy=_remat_policies[config.remat], prevent_cse=False)
    if gathers:  # of unrolled layers, XLA would gather all at once and keep them
        unroll = 1
    x, new = jax.lax.scan(layer, x, (tree["layers"], past), unroll=unroll)
    with jax.named_scope("norm"):
        return merge(_norm, config, parallel.all_gather("norm", tree["norm"]))(x), new


def separate_documents(config: ModelConfig, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the documents of packed sequences by the token that begins each.

    A piece of a document that an earlier sequence began is a document of its own. A domain token,
    which only position 0 may hold, belongs to every document, and they count positions from 1.

    Returns:
      Positions [B, T] int32 of tokens in their documents, and a mask [B, 1, T, T] bool, True if
      the token of the last axis is in a document of the second last axis's token. Attention makes
      it causal.
    """
    if not isinstance(config, BoundModelConfig):
        raise ValueError("document_mask needs the ids of a tokenizer: use BoundModelConfig")
    positions = jnp.arange(tokens.shape[-1])
    labelled = tokens[:, :1] >= config.text_ids  # [B, 1]
    first = labelled.astype(positions.dtype)
    starts = jax.lax.cummax(jnp.where(tokens == config.eod, positions, first), axis=1)  # BT
    same = starts[:, :, None] == starts[:, None, :]
    always = (labelled & (positions == 0))[:, None, :]
    return positions - starts + first, (same | always)[:, None]


def logits(config: ModelConfig, tree: Tree, states: jax.Array) -> jax.Array:
    """Computes logits [B, T, V] float32 of normed states [B, T, E]; all leaves are gathered."""
    table = tree["embed"]["tokens"]["embedding"].astype(states.dtype)
    scores = jnp.einsum("bte,ve->btv", states, table, preferred_element_type=jnp.float32)
    if config.has_output_bias:
        scores = merge(OutputBias, config, tree["unembed"])(scores)
    return scores


def token_logprobs(
    config: ModelConfig,
    tree: Tree,
    tokens: jax.Array,
    targets: jax.Array,
    parallel: ModelParallel = SINGLE_DEVICE,
) -> jax.Array:
    """Computes the log-probability in nats of each target given its prefix.

    Args:
      config: shape and numerics; with `logits_chunk` c, logits exist for c positions at a time.
      tree: full parameter tree of one domain.
      tokens: inputs [B, T] int32.
      targets: tokens that follow the inputs, [B, T] int32.
      parallel: collectives of a device that holds only a part of `tree` or of the positions.

    Returns:
      [B, T] float32, or the device's own positions of it.
    """
    tree = dict(tree)
    for name in ("embed", "unembed") if config.has_output_bias else ("embed",):
        with jax.named_scope(name):
            tree[name] = parallel.all_gather(name, tree[name])
    states = parallel.local_positions(hidden_states(config, tree, tokens, parallel))
    targets = parallel.local_positions(targets)
    return target_logprobs(config, tree, states, targets)


def target_logprobs(
    config: ModelConfig, tree: Tree, states: jax.Array, targets: jax.Array
) -> jax.Array:
    """Computes the log-probability [B, T] of targets under normed states [B, T, E], see above."""

    def score(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, targets = pair
        scores = logits(config, tree, states)
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(scores, axis=-1)

    with jax.named_scope("logprobs"):
        chunk = config.logits_chunk
        if not chunk or chunk >= targets.shape[1]:
            return score((states, targets))
        pairs = jax.tree.map(lambda x: _chunks(x, chunk), (states, targets))
        logprobs = jax.lax.map(jax.checkpoint(score, prevent_cse=False), pairs)  # [T/c, B, c]
        return jnp.moveaxis(logprobs, 0, 1).reshape(targets.shape)


def init_tree(config: ModelConfig, key: jax.Array) -> Tree:
    """Initialises the full tree of one domain, float32, as GPT-2 does."""
    trunk_key, ffn_key = jax.random.split(key)
    embed_key, layers_key = jax.random.split(trunk_key)

    def layer(key: jax.Array, ffn_key: jax.Array) -> Tree:
        return _leaves(Layer(config, rngs=nnx.Rngs(key), ffn_rngs=nnx.Rngs(ffn_key)))

    each = (jax.random.split(k, config.layers) for k in (layers_key, ffn_key))
    tree = {
        "embed": _leaves(Embeddings(config, rngs=nnx.Rngs(embed_key))),
        "layers": jax.vmap(layer)(*each),
        "norm": _leaves(_norm(config, nnx.Rngs(embed_key))),
    }
    if config.has_output_bias:
        tree["unembed"] = _leaves(OutputBias(config, rngs=nnx.Rngs(embed_key)))
    return tree


def layer_axes(path: Sequence[str]) -> int:
    """Returns how many leading axes of the leaf at `path` run over layers: 1 below "layers"."""
    return int(path[0] == "layers")


def merge(module: Callable[..., nnx.Module], config: ModelConfig, leaves: Tree) -> Any:
    """Returns the module that `module` makes, with `leaves` as its parameters."""
    return nnx.merge(_graphdef(module, config), leaves)


@functools.lru_cache
def _graphdef(module: Callable[..., nnx.Module], config: ModelConfig) -> nnx.GraphDef:
    abstract = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)[0]


def _leaves(module: nnx.Module) -> Tree:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """Arranges positions [B, T, ...] as chunks [T / size, B, size, ...]."""
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
    """Returns the spread of what a layer adds; GPT-2 shrinks it by the 2L additions."""
    return _INIT_STD / math.sqrt(2 * config.layers)
