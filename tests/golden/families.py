"""Writes families.npz: logits of the classes of transformers for the models of test_families.py.

    pip install torch transformers       # beside the project's own environment
    PYTHONPATH=.:tests python tests/golden/families.py

Written with torch 2.13.0 (CPU) and transformers 5.24.0, float32, eager attention.
"""

from typing import Any

import numpy as np
import torch
import transformers
from test_families import GOLDEN, SHAPES
from test_transformer import sequences
from transformers_names import tensors

from demix_jax.config.schema import ModelConfig


def main() -> None:
    """Runs each family's class on the tokens of the test, and saves all logits."""
    tokens, _ = sequences()
    found = {}
    for family, config in SHAPES.items():
        model = CLASSES[family](settings(family, config))
        state = {name: torch.tensor(x) for name, x in tensors(family, config).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        tied = {"lm_head.weight"} if config.tie_embeddings else set()
        assert set(missing) <= tied, missing
        assert not unexpected, unexpected
        model.tie_weights()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found[family] = model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        print(family, found[family].std())
    np.savez_compressed(GOLDEN, **found)


CLASSES: dict[str, Any] = {
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "olmo2": transformers.Olmo2ForCausalLM,
}


def settings(family: str, config: ModelConfig) -> Any:
    """The configuration of transformers that says what ours says."""
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=29, n_positions=12, n_embd=16, n_layer=2, n_head=4, layer_norm_epsilon=1e-5
        )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        }
    kind = CLASSES[family].config_class
    return kind(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


if __name__ == "__main__":
    main()
