"""The one-domain program in float64 NumPy, from the definitions: a sequence and a head at a time.

GPT-2 (Radford et al. 2019), and the choices of later decoders: RMS norms (Zhang and Sennrich 2019),
rotary positions (Su et al. 2021) with linear scaling (Chen et al. 2023) and that of Llama 3.1,
SwiGLU (Shazeer 2020), grouped heads (Ainslie et al. 2023), norms of queries and keys, norms behind
blocks.
"""

import cmath
import math
from typing import Any

import jax
import numpy as np

from demix_jax.config.families import FAMILIES
from demix_jax.config.schema import ModelConfig

# Changes of any small model: each choice of a field is in one of them at least.
LLAMA: dict[str, Any] = {
    **FAMILIES["llama"],
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "hidden": 24,
    "rope_theta": 100.0,
    "rope_scaling": "llama3",
    "rope_factor": 4.0,
    "rope_high_freq_factor": 3.0,
    "rope_original_context": 24,  # of the four frequencies 1 is kept, 2 are divided, 1 is between
}
OLMO: dict[str, Any] = {
    **FAMILIES["olmo2"],
    **{"heads": 4, "kv_heads": 2, "head_width": 2, "hidden": 12, "norm_eps": 1e-2},
    **{"rope_scaling": "linear", "rope_factor": 2.0, "tie_embeddings": True},
    **{"activation": "gelu_exact", "ffn_bias": True},
}
QWEN: dict[str, Any] = {
    **FAMILIES["qwen3"],
    **{"heads": 4, "kv_heads": 1, "head_width": 6, "hidden": 10, "qkv_bias": True},
}
SHAPES: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": LLAMA, "olmo": OLMO, "qwen": QWEN}


def states(config: ModelConfig, tree: Any, tokens: np.ndarray) -> np.ndarray:
    """Normed states [B, T, E] of tokens [B, T]."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    found = []
    for sequence in tokens:
        x = tree["embed"]["tokens"]["embedding"][sequence]
        if config.positions == "learned":
            x = x + tree["embed"]["positions"]["embedding"][: len(sequence)]
        for i in range(config.layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"])
            for block, norm in ((_attention, "attention_norm"), (_ffn, "ffn_norm")):
                leaves = layer[norm.removesuffix("_norm")]
                if config.norm_place == "pre":
                    x = x + block(config, _norm(config, x, layer[norm]), leaves)
                else:
                    x = x + _norm(config, block(config, x, leaves), layer[norm])
        found.append(_norm(config, x, tree["norm"]))
    return np.stack(found)


def logprobs(config: ModelConfig, tree: Any, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-probabilities [B, T] of targets."""
    table = tree["embed"]["tokens"]["embedding"] if config.tie_embeddings else unembed(tree)
    logits = states(config, tree, tokens) @ np.asarray(table, np.float64).T
    logits -= logits.max(-1, keepdims=True)
    everything = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(everything, targets[..., None], -1)[..., 0]


def unembed(tree: Any) -> np.ndarray:
    return tree["unembed"]["kernel"]


def frequency(config: ModelConfig, pair: int) -> float:
    """Radians per position of a pair of a head's numbers."""
    plain = config.rope_theta ** (-2 * pair / config.head_dim)
    if config.rope_scaling == "none":
        return plain
    if config.rope_scaling == "linear":
        return plain / config.rope_factor
    wavelength, original = 2 * math.pi / plain, config.rope_original_context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if wavelength < original / high:
        return plain
    if wavelength > original / low:
        return plain / config.rope_factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * plain / config.rope_factor + smooth * plain


def _norm(config: ModelConfig, x: np.ndarray, p: Any) -> np.ndarray:
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale"]
    return scaled + p["bias"] if config.norm == "layernorm" else scaled


def _linear(x: np.ndarray, p: Any) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0)


def _attention(config: ModelConfig, x: np.ndarray, p: Any) -> np.ndarray:
    heads, size = config.heads, config.head_width or config.width // config.heads
    groups = config.kv_heads or heads
    of_group = heads // groups
    made = np.einsum("te,egn->tgn", x, p["qkv"]["kernel"]) + p["qkv"].get("bias", 0)
    q, k, v = np.zeros((3, heads, len(x), size))
    for head in range(heads):
        group, place = divmod(head, of_group)
        at = slice(group * size, group * size + size)
        q[head], k[head], v[head] = made[:, place, at], made[:, -2, at], made[:, -1, at]
    if config.qk_norm != "none":
        scales = p["q_norm"]["scale"], p["k_norm"]["scale"]
        q, k = (_heads_norm(config, *pair) for pair in ((q, scales[0]), (k[::of_group], scales[1])))
        k = np.repeat(k, of_group, axis=0)
    if config.positions == "rope":
        q, k = _rotated(config, q), _rotated(config, k)
    out = np.zeros((len(x), heads * size))
    for head in range(heads):
        for t in range(len(x)):
            score = k[head, : t + 1] @ q[head, t] / math.sqrt(size)
            share = np.exp(score - score.max())
            out[t, head * size : head * size + size] = share / share.sum() @ v[head, : t + 1]
    return _linear(out, p["out"])


def _heads_norm(config: ModelConfig, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Of heads [N, T, h]: each position's, over one head or over all."""
    found = np.zeros_like(x)
    for n, t in np.ndindex(x.shape[:2]):
        over = x[n, t] if config.qk_norm == "head" else x[:, t].ravel()
        own = scale if config.qk_norm == "head" else scale[n]
        found[n, t] = x[n, t] / math.sqrt((over**2).mean() + config.norm_eps) * own
    return found


def _rotated(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """Of heads [N, T, h]: numbers i and i + h / 2 as one complex number, turned."""
    half = x.shape[-1] // 2
    found = np.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(half):
            turned = (x[:, t, i] + 1j * x[:, t, i + half]) * cmath.exp(
                1j * t * frequency(config, i)
            )
            found[:, t, i], found[:, t, i + half] = turned.real, turned.imag
    return found


def _ffn(config: ModelConfig, x: np.ndarray, p: Any) -> np.ndarray:
    up = _linear(x, p["up"])
    if config.activation == "swiglu":
        gate = _linear(x, p["gate"])
        return _linear(gate / (1 + np.exp(-gate)) * up, p["down"])
    if config.activation == "gelu_exact":
        return _linear(up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2, p["down"])
    tanh = np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))
    return _linear(0.5 * up * (1 + tanh), p["down"])
