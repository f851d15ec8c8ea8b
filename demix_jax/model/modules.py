"""The modules of the one-domain program: attention, feed-forward block, norms and tables.

Each is written for one domain and one device; a `ModelParallel` brings the collectives where
devices share a layer's work. Shape letters are those of `transformer.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from demix_jax.config.schema import ModelConfig
from demix_jax.model.products import attend, matmul

Tree = Any  # nested dicts of arrays
KeysValues = tuple[jax.Array, jax.Array]

_INIT_STD = 0.02  # GPT-2


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
        return matmul(x, kernel) + bias


class Linear(nnx.Linear):
    """A matrix with a bias, added after products of rows that devices share are summed."""

    def __call__(self, x: jax.Array, parallel: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Applies the matrix at every position."""
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, self.kernel, self.bias))
        return parallel.psum(matmul(x, kernel)) + bias


class Attention(nnx.Module):
    """Causal multi-head self-attention with biases; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.head_width = config.width // config.heads
        self.qkv = QKVProjection(config, rngs=rngs)
        std = _residual_std(config)
        self.out = _linear(config, config.width, config.width, std, rngs)

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
        attended = attend(q, keys, values, mask, past is None)
        return self.out(attended.reshape(*x.shape[:2], -1), parallel), (k, v)


class FeedForward(nnx.Module):
    """Tanh-GELU MLP of width F; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, std = config.ffn_width, _residual_std(config)
        self.up = _linear(config, config.width, hidden, _INIT_STD, rngs)
        self.down = _linear(config, hidden, config.width, std, rngs)

    def __call__(self, x: jax.Array, parallel: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Applies the MLP at every position."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True), parallel)


class Layer(nnx.Module):
    """Pre-norm transformer layer; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, ffn_rngs: nnx.Rngs | None = None):
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = norm(config, rngs)
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
        """Sums the embeddings of tokens [B, T] and of positions [T] or [B, T].

        Rows are gathered, then cast: a cast of the table would touch all of it, and sum its
        gradient in the dtype of activations.
        """
        return _rows(self.tokens, tokens) + _rows(self.positions, positions)


def _rows(embed: nnx.Embed, ids: jax.Array) -> jax.Array:
    """Returns rows of a table, in the dtype of activations."""
    return jnp.take(embed.embedding[...], ids, axis=0).astype(embed.dtype)


class OutputBias(nnx.Module):
    """A bias of the logits, [V] float32."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        del rngs
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))
        self.scale = config.output_bias_scale

    def __call__(self) -> jax.Array:
        """Returns the scaled bias."""
        return self.scale * self.bias[...]


# The dimension, counted from the last, along which the heads or hidden units of a leaf lie, by path
# of the tree; tensor parallelism shards it. Leaves that are not named have none.
TENSOR_PARALLEL_DIMS: Tree = {
    "layers": {
        "attention": {"qkv": {"kernel": -1, "bias": -1}, "out": {"kernel": -2}},
        "ffn": {"up": {"kernel": -1, "bias": -1}, "down": {"kernel": -2}},
    }
}


def merge(module: Callable[..., nnx.Module], config: ModelConfig, leaves: Tree) -> Any:
    """Returns the module that `module` makes, with `leaves` as its parameters."""
    return nnx.merge(_graphdef(module, config), leaves)


@functools.lru_cache
def _graphdef(module: Callable[..., nnx.Module], config: ModelConfig) -> nnx.GraphDef:
    abstract = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)[0]


def parameters(module: nnx.Module) -> Tree:
    """Returns the parameters of a module as nested dicts."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _linear(
    config: ModelConfig,
    inputs: int,
    outputs: int,
    std: float,
    rngs: nnx.Rngs,
) -> Any:
    init = nnx.initializers.normal(std)
    return Linear(inputs, outputs, dtype=jnp.dtype(config.dtype), kernel_init=init, rngs=rngs)


def norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a LayerNorm of the residual stream."""
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
