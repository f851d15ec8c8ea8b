"""Attention of queries to keys: one function, and the kernel that computes it on each platform.

    xla     every platform, dtype and mask; writes the weights [B, H, T, S] to memory
    cudnn   cuDNN's flash attention: NVIDIA GPUs
    splash  Splash, a flash attention in Pallas: TPUs

The fused kernels keep the weights on the chip, skip the blocks that causality masks, and leave the
logarithms of the softmax's normalisers [B, H, T] for the backward pass. `resolve_kernel` chooses by
the devices of the mesh that a program is built for, which need not be here: what is lowered holds
nothing of the other kernels, whereas `jax.lax.platform_dependent` would trace all of them, and
cuDNN's cannot be traced where cuDNN is not installed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from demix_jax.config.schema import BoundModelConfig, ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.products import dot_product_attention

_PLATFORMS = {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}
_DEVICES = {"cudnn": "NVIDIA GPUs", "splash": "TPUs"}
_OUTPUT = "attention"  # name of what a kernel leaves for the backward pass
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # primitive of cuDNN's forward pass
_LANES = 128  # of a TPU: Splash's blocks are multiples

# Policy for `jax.checkpoint`: what a fused kernel leaves for its backward pass is saved.
save_attention = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(_OUTPUT),
    lambda primitive, *_, **__: primitive.name == _CUDNN_FORWARD,
)


def is_fused(kernel: str) -> bool:
    """Returns True for kernels that keep the attention weights on the chip."""
    return kernel in _PLATFORMS


def resolve_kernel(model: ModelConfig, device: Any) -> str:
    """Returns the kernel that `model.attention` stands for on devices like `device`.

    Args:
      model: shape of the model; `auto` takes the platform's fused kernel if it fits, else xla.
      device: device of the mesh that a program is built for, real or planned.

    Raises:
      DemixError: a kernel that is named does not fit platform, dtype, head size or mask.
    """
    if model.attention != "auto":
        if reason := _misfit(model.attention, model, device):
            raise DemixError(f"model.attention {model.attention} {reason}")
        return model.attention
    return next((k for k in _PLATFORMS if not _misfit(k, model, device)), "xla")


def kernel_summary(model: ModelConfig, device: Any) -> str:
    """Says which kernel computes attention, and why not the platform's fused one; "" on CPUs."""
    own = next((k for k, platforms in _PLATFORMS.items() if device.platform in platforms), "")
    kernel = resolve_kernel(model, device)
    if not own or kernel == own or model.attention != "auto":
        return f"attention: {kernel}" * bool(own)
    reason = _misfit(own, model, device).partition(";")[0]
    return f"attention: {kernel}, as {own} {reason}"


def _misfit(kernel: str, model: ModelConfig, device: Any) -> str:
    """Says what of a model or device a kernel does not take, and what would do; "" if it fits."""
    if kernel == "xla":
        return ""
    if device.platform not in _PLATFORMS[kernel]:
        return f"is for {_DEVICES[kernel]}, not for {device.platform}; use auto or xla"
    if kernel == "splash":
        labelled = isinstance(model, BoundModelConfig) and model.text_ids < model.vocab_size
        if model.document_mask and labelled:
            return (
                "cannot show a domain token to every document: its mask is a number for each "
                "token; with variant domain_token and model.document_mask use auto or xla"
            )
        return ""
    capability, size = float(device.compute_capability), model.head_dim
    most = 256 if capability >= 9 else 128
    if capability < 8:
        return f"needs compute capability 8.0 (A100) or more, not {capability}; use auto or xla"
    if model.dtype != "bfloat16":
        return f"takes bfloat16, not model.dtype {model.dtype}; use bfloat16, or attention xla"
    if size % 8 or size > most:
        return (
            f"takes heads of a multiple of 8 numbers, at most {most} on this GPU; "
            f"here {size}; change model.heads or model.head_width, or use auto or xla"
        )
    if model.document_mask:
        return (
            "cannot mask documents from each other (model.document_mask): it takes a causal mask "
            "alone; use auto or xla"
        )
    return ""


def attend(
    kernel: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """Computes the mean of values that queries choose by their keys; softmax in float32.

    Args:
      kernel: xla, cudnn or splash; auto means xla, as nothing is known of the devices.
      q: queries [B, T, H, h].
      k: keys [B, S, K, h]; each of the K heads serves H / K heads of queries.
      v: values, array like `k`.
      mask: [B, 1, T, S] bool, True where a query attends to a key; or, for splash, numbers of the
        tokens' documents, [B, T] int32; None means no mask.
      causal: True if T is S and no position attends to later ones.
      interpret: True to run Splash as ordinary operations, on any platform and very slowly.

    Returns:
      [B, T, H, h], in the dtype of `q`.
    """
    if kernel == "splash" and causal:
        return _splash(q, k, v, mask, interpret)
    if kernel == "cudnn" and causal and mask is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return dot_product_attention(q, k, v, mask, causal)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None, interpret: bool
) -> jax.Array:
    """Runs Splash on sequences padded to whole blocks; causality hides the padding from them."""
    length = q.shape[1]
    padding = -length % _LANES
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # Splash does not scale
    q, k, v = (jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)]) for x in (q, k, v))
    if documents is not None:
        documents = jnp.pad(documents, [(0, 0), (0, padding)], mode="edge")
    return _splash_blocks(interpret, q, k, v, documents)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _splash_blocks(
    interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, documents: Any
) -> jax.Array:
    """Runs Splash on scaled queries [B, T, H, h], keys and values [B, T, K, h]."""
    return _splash_forward(interpret, q, k, v, documents)[0]


def _splash_forward(
    interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, documents: Any
) -> tuple[jax.Array, Any]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, documents: Any) -> Any:
        kernel = _splash_kernel(q.shape[2], q.shape[1], interpret)
        arrays = map(_heads_first, (q, k, v))
        output, pullback = jax.vjp(functools.partial(kernel, documents=documents), *arrays)
        return _heads_first(output), pullback

    return _unchecked(run, q)(q, k, v, documents)


def _splash_backward(interpret: bool, pullback: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    del interpret

    def run(pullback: Any, cotangent: jax.Array) -> Any:
        return tuple(map(_heads_first, pullback(_heads_first(cotangent))))

    return *_unchecked(run, cotangent)(pullback, cotangent), None


_splash_blocks.defvjp(_splash_forward, _splash_backward)


def _heads_first(x: jax.Array) -> jax.Array:
    """Exchanges positions and heads."""
    return x.swapaxes(1, 2)


def _unchecked(function: Any, like: jax.Array) -> Any:
    """Returns a function that runs where shard_map does not check which axes arrays vary over.

    Splash does not declare that of its kernels' outputs, so they could not be called otherwise. All
    outputs come back varying over the axes that `like` does.
    """
    varying = tuple(jax.typeof(like).manual_axis_type.varying)
    if not varying:
        return function
    mesh, every = jax.sharding.get_abstract_mesh(), PartitionSpec()
    inner = jax.shard_map(function, mesh=mesh, in_specs=every, out_specs=every, check_vma=False)

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in varying if a not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying")

    return lambda *args: jax.tree.map(vary, inner(*args))


def _splash_kernel(heads: int, length: int, interpret: bool) -> Any:
    """Returns causal Splash of `length` positions, a multiple of a block; arrays [B, H, T, h]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(n for n in (512, 256, 128) if length % n == 0)
    sizes: Any = [block] * 8  # of queries and keys, in every pass
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(*sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=_OUTPUT,
        interpret=interpret,
    )

    def run(q: jax.Array, k: jax.Array, v: jax.Array, documents: Any) -> jax.Array:
        segments = None if documents is None else splash.SegmentIds(documents, documents)
        return jax.vmap(kernel)(q, k, v, segments)

    return run
