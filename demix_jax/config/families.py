"""The families of decoders whose layers the one-domain program has, as choices of its fields.

A family is nothing but a preset: the program, its tree and its files know only the fields.
"""

import types
from collections.abc import Mapping
from typing import Any

from demix_jax.config.model import ModelConfig
from demix_jax.errors import DemixError, suggest

_LLAMA: Mapping[str, Any] = types.MappingProxyType(
    {
        "norm": "rmsnorm",
        "positions": "rope",
        "activation": "swiglu",
        "qkv_bias": False,
        "out_bias": False,
        "ffn_bias": False,
        "tie_embeddings": False,
    }
)
# By the `model_type` of Hugging Face: what all models of a family have in common. Widths, heads,
# wavelengths and the tying of embeddings differ from model to model, and can be given.
FAMILIES: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "gpt2": {},
        "llama": _LLAMA,
        "qwen2": {**_LLAMA, "qkv_bias": True, "norm_eps": 1e-6},
        "qwen3": {**_LLAMA, "qk_norm": "head", "norm_eps": 1e-6},
        "olmo2": {**_LLAMA, "qk_norm": "all", "norm_place": "post"},
    }
)


def preset(family: str, **fields: Any) -> ModelConfig:
    """Returns a model of a family, with other fields as given.

    Args:
      family: name of a row of `FAMILIES`.
      **fields: fields of `ModelConfig`; they win over those of the family.

    Raises:
      DemixError: no such family.
    """
    if family not in FAMILIES:
        raise DemixError(
            f"there is no family {family!r}; choose from {', '.join(FAMILIES)}"
            f"{suggest(family, FAMILIES)}"
        )
    return ModelConfig(**{**FAMILIES[family], **fields})
