"""Families of decoders: their presets, and logits that the classes of transformers gave.

`tests/golden/families.py` wrote the logits, with the parameters that are drawn here.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_transformer import sequences

from demix_jax.config.families import FAMILIES, preset
from demix_jax.config.schema import Config, ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.loss import logits
from demix_jax.model.transformer import hidden_states, init_tree

GOLDEN = Path(__file__).parent / "golden" / "families.npz"
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "context": 12, "vocab_size": 29}
GROUPED: dict[str, Any] = SMALL | {"kv_heads": 2, "hidden": 24, "rope_theta": 100.0}
LLAMA3: dict[str, Any] = {
    **{"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 24},
    **{"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 3.0},
}
SHAPES: dict[str, ModelConfig] = {
    "gpt2": preset("gpt2", **SMALL),
    "llama": preset("llama", **GROUPED, **LLAMA3, head_width=8),
    "qwen2": preset("qwen2", **GROUPED, tie_embeddings=True),
    "qwen3": preset("qwen3", **GROUPED, head_width=6, rope_scaling="linear", rope_factor=2.0),
    "olmo2": preset("olmo2", **GROUPED),
}


def drawn_tree(config: ModelConfig) -> Any:
    """Parameters that only NumPy and the paths of leaves decide; scales are about one."""
    rng = np.random.default_rng(17)
    shapes = jax.eval_shape(lambda: init_tree(config, jax.random.key(0)))
    return jax.tree.map_with_path(
        lambda path, x: np.float32((path[-1].key == "scale") + 0.2 * rng.standard_normal(x.shape)),
        shapes,
    )


@functools.partial(jax.jit, static_argnums=0)
def program(config, tree, tokens):
    return logits(config, tree, hidden_states(config, tree, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    with np.load(GOLDEN) as golden:
        expected = golden[family]
    config = SHAPES[family]
    found = program(config, drawn_tree(config), sequences()[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_presets_are_valid_and_can_be_changed():
    for family, fields in FAMILIES.items():
        config = Config(model=preset(family, layers=3)).validate().model
        assert config.layers == 3
        assert all(getattr(config, name) == value for name, value in fields.items()), family
    assert preset("gpt2") == ModelConfig()
    assert preset("llama", tie_embeddings=True).tie_embeddings
    with pytest.raises(DemixError, match="no family 'lama'; choose from .*; did you mean 'llama'"):
        preset("lama")
