"""Rotary positions in config.json: nested, in two spellings; and flat, as `ModelConfig` has them.

    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}}
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, ...}}

The first is what every version of transformers reads, and is what is written.
"""

from collections.abc import Mapping
from typing import Any

# Names in the nested object, by those of `ModelConfig`.
_NESTED = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
# Fields that a rule of scaling has.
FACTORS = {"linear": ("rope_factor",), "llama3": tuple(_NESTED)}


def flatten_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json with rotary positions in fields of `ModelConfig`."""
    values = dict(config)
    nested: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        nested |= values.pop(key, None) or {}
    if not nested:
        return values
    rule = nested.get("rope_type", nested.get("type", "default"))
    values["rope_rule"] = rule
    values |= {flat: nested[name] for flat, name in _NESTED.items() if name in nested}
    return values | {key: nested[key] for key in ("rope_theta",) if key in nested}


def nest_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields with rotary positions nested; the inverse of `flatten_rope`."""
    config = dict(values)
    rule = config.pop("rope_rule", "default")
    flat = {name: config.pop(name) for name in _NESTED if name in config}
    nested = {_NESTED[name]: flat[name] for name in FACTORS.get(rule, ())}
    return config | ({"rope_scaling": {"rope_type": rule, **nested}} if nested else {})
