"""Rotary position embeddings: queries and keys are rotated by angles that grow with position.

A head's numbers i and i + h / 2 are a pair (the "rotate half" layout of Hugging Face), which
position p rotates by the angle p f_i. The frequencies f_i are theta^(-2 i / h), which a rule may
lower for contexts longer than those of training: linear divides all of them, llama3 only those
whose wavelength is long against the original context.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from demix_jax.config.schema import ModelConfig

Rotation = tuple[jax.Array, jax.Array]


def frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the frequency of each pair of a head, [h / 2] float32, in radians per position."""
    pairs = np.arange(0, config.head_dim, 2) / config.head_dim
    plain = config.rope_theta**-pairs
    scaled = plain / config.rope_factor
    if config.rope_scaling == "none":
        scaled = plain
    elif config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        periods = config.rope_original_context * plain / (2 * math.pi)  # in the original context
        kept = np.clip((periods - low) / (high - low), 0, 1)
        scaled = kept * plain + (1 - kept) * scaled
    return scaled.astype(np.float32)


def rotation(config: ModelConfig, positions: jax.Array) -> Rotation:
    """Returns cosines and sines [..., T, 1, h / 2] float32 of the angles at positions [..., T]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates the pairs of heads [B, T, N, h], in float32; returns the type of `x`."""
    cos, sin = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    pairs = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(pairs, axis=-1).astype(x.dtype)
