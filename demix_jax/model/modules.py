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
from demix_jax.model.attention import attend
from demix_jax.model.products import attend_to_past, matmul
from demix_jax.model.rope import Rotation, rotate

Tree = Any  # nested dicts of arrays
KeysValues = tuple[jax.Array, jax.Array]

_INIT_STD = 0.02  # GPT-2 and Llama


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
    """Queries, keys and values, `[B, T, E] -> [B, T, H / K + 2, K h]`.

    Each of K groups has H / K heads of queries and one of keys and values. The first H / K matrices
    give every group a head of queries, the last two its keys and values: without grouped heads they
    are the three matrices of queries, keys and values. Sharding the last dimension shards groups.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = config.heads // config.key_heads + 2, config.key_heads * config.head_dim
        bias = config.qkv_bias
        linear = _linear(config, config.width, math.prod(shape), _INIT_STD, rngs, bias=bias)
        self.kernel = nnx.Param(linear.kernel[...].reshape(config.width, *shape))
        self.bias = nnx.Param(linear.bias[...].reshape(shape)) if bias else None
        self.dtype, self.head_dim = linear.dtype, config.head_dim

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, T, H, h], keys and values [B, T, K, h] at every position.

        Under tensor parallelism they are the heads that the device has.
        """
        x, kernel = (jnp.asarray(a, self.dtype) for a in (x, self.kernel))
        qkv = matmul(x, kernel)
        if self.bias is not None:
            qkv = qkv + jnp.asarray(self.bias, self.dtype)
        heads = (*x.shape[:2], -1, self.head_dim)
        *queries, k, v = (qkv[:, :, i].reshape(heads) for i in range(qkv.shape[2]))  # BTKh
        return jnp.concatenate(queries, axis=-1).reshape(heads), k, v  # of a group together


class HeadsNorm(nnx.Module):
    """RMS norm of N heads, over each or, with `qk_norm` "all", over all; `[B, T, N, h]` kept."""

    def __init__(self, config: ModelConfig, heads: int):
        over_all = config.qk_norm == "all"
        self.scale = nnx.Param(jnp.ones((heads,) * over_all + (config.head_dim,)))
        self.heads, self.epsilon = heads, config.norm_eps

    def __call__(self, x: jax.Array, parallel: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Divides heads by their root mean square, in float32; scales them."""
        exact, scale = x.astype(jnp.float32), self.scale[...]
        if scale.ndim == 1:
            square = jnp.square(exact).mean(-1, keepdims=True)
        else:  # devices may share the heads
            total = parallel.psum(jnp.square(exact).sum((-2, -1), keepdims=True))
            square = total / (self.heads * x.shape[-1])
        return (exact * jax.lax.rsqrt(square + self.epsilon) * scale).astype(x.dtype)


class Linear(nnx.Linear):
    """A matrix, and a bias that is added after products of rows that devices share are summed."""

    def __call__(self, x: jax.Array, parallel: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Applies the matrix at every position."""
        x, kernel = (jnp.asarray(a, self.dtype) for a in (x, self.kernel))
        total = parallel.psum(matmul(x, kernel))
        return total if self.bias is None else total + jnp.asarray(self.bias, self.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped heads; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = config.attention
        self.qkv = QKVProjection(config, rngs=rngs)
        std, bias = _residual_std(config), config.out_bias
        inputs = config.heads * config.head_dim
        self.out = _linear(config, inputs, config.width, std, rngs, bias=bias)
        normed = config.qk_norm != "none"
        self.q_norm = HeadsNorm(config, config.heads) if normed else None
        self.k_norm = HeadsNorm(config, config.key_heads) if normed else None

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        rotation: Rotation | None = None,
        parallel: ModelParallel = SINGLE_DEVICE,
        past: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Attends from every position to itself and those before it; softmax in float32.

        `mask` is as `attend` takes it. With keys and values of a `past` [B, K, S, h], it is
        [B, 1, T, S + T] and says all, and no fused kernel is used. A `rotation` is of the new
        positions; keys are cached rotated.

        Returns:
          The sum to add to the residual stream, and the keys and values [B, T, K, h].
        """
        q, k, v = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, parallel), self.k_norm(k, parallel)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if past is None:
            attended = attend(self.kernel, q, k, v, mask)
        else:
            assert mask is not None
            attended = attend_to_past(q, k, v, past, mask)
        return self.out(attended.reshape(*x.shape[:2], -1), parallel), (k, v)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "swiglu": jax.nn.silu,
}


class FeedForward(nnx.Module):
    """MLP of width F, whose hidden units a gate may scale; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, hidden, bias = config.width, config.ffn_width, config.ffn_bias
        self.activation = _ACTIVATIONS[config.activation]
        self.up = _linear(config, width, hidden, _INIT_STD, rngs, bias=bias)
        std = _residual_std(config)
        self.down = _linear(config, hidden, width, std, rngs, bias=bias)
        gated = config.is_gated
        self.gate = _linear(config, width, hidden, _INIT_STD, rngs, bias=bias) if gated else None

    def __call__(self, x: jax.Array, parallel: ModelParallel = SINGLE_DEVICE) -> jax.Array:
        """Applies the MLP at every position."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)), parallel)
        return self.down(self.activation(self.gate(x)) * self.up(x), parallel)


class Layer(nnx.Module):
    """Transformer layer, with norms before or behind its two blocks; `[B, T, E] -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, ffn_rngs: nnx.Rngs | None = None):
        self.norm_place = config.norm_place
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = norm(config, rngs)
        self.ffn = FeedForward(config, rngs=ffn_rngs or rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        rotation: Rotation | None,
        parallel: ModelParallel,
        past: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Adds attention and the feed-forward block to the residual stream; see `Attention`."""
        with jax.named_scope("attention"):
            normed = self._norm("pre", self.attention_norm, x)
            attended, new = self.attention(normed, mask, rotation, parallel, past)
            x = x + self._norm("post", self.attention_norm, attended)
        with jax.named_scope("ffn_norm"):
            normed = self._norm("pre", self.ffn_norm, x)
        with jax.named_scope("ffn"):
            made = self.ffn(normed, parallel)
        with jax.named_scope("ffn_norm"):
            return x + self._norm("post", self.ffn_norm, made), new

    def _norm(self, place: str, norm: nnx.Module, x: jax.Array) -> jax.Array:
        """Applies a norm if this is its place."""
        return norm(x) if place == self.norm_place else x


class Embeddings(nnx.Module):
    """Token table, and the position table if there is one; `[B, T] int32 -> [B, T, E]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(
            nnx.Embed,
            features=config.width,
            dtype=jnp.dtype(config.dtype),
            embedding_init=nnx.initializers.normal(_INIT_STD),
            rngs=rngs,
        )
        self.tokens = embed(num_embeddings=config.vocab_size)
        learned = config.positions == "learned"
        self.positions = embed(num_embeddings=config.context) if learned else None

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Sums the embeddings of tokens [B, T] and, if learned, of positions [T] or [B, T].

        Rows are gathered, then cast: a cast of the table would touch all of it, and sum its
        gradient in the dtype of activations.
        """
        x = _rows(self.tokens, tokens)
        return x if self.positions is None else x + _rows(self.positions, positions)


def _rows(embed: nnx.Embed, ids: jax.Array) -> jax.Array:
    """Returns rows of a table, in the dtype of activations."""
    return jnp.take(embed.embedding[...], ids, axis=0).astype(embed.dtype)


class UnembeddingTable(nnx.Module):
    """A table of the unembedding alone, where it is not that of the tokens; [V, E]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = config.vocab_size, config.width
        self.kernel = nnx.Param(nnx.initializers.normal(_INIT_STD)(rngs.params(), shape))


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
# of the tree; tensor parallelism shards it. Leaves that are not named, or have fewer dimensions
# besides that of layers, have none.
TENSOR_PARALLEL_DIMS: Tree = {
    "layers": {
        "attention": {
            "qkv": {"kernel": -1, "bias": -1},
            "q_norm": {"scale": -2},  # over all heads; a norm over each has no such dimension
            "k_norm": {"scale": -2},
            "out": {"kernel": -2},
        },
        "ffn": {
            "gate": {"kernel": -1, "bias": -1},
            "up": {"kernel": -1, "bias": -1},
            "down": {"kernel": -2},
        },
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
    *,
    bias: bool,
) -> Any:
    init, dtype = nnx.initializers.normal(std), jnp.dtype(config.dtype)
    return Linear(inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs)


def norm(config: ModelConfig, rngs: nnx.Rngs) -> Any:
    """Makes a norm of the residual stream."""
    kind: Any = {"layernorm": nnx.LayerNorm, "rmsnorm": nnx.RMSNorm}[config.norm]
    return kind(
        config.width,
        epsilon=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits
        rngs=rngs,
    )


def _residual_std(config: ModelConfig) -> float:
    """Returns the spread of what a layer adds; GPT-2 shrinks it by the 2L additions."""
    return _INIT_STD / math.sqrt(2 * config.layers)
