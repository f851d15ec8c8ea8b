"""Memory of a step against arrays on devices and the residuals of the layers."""

import dataclasses
import itertools
import math

import decoder64
import jax
import jax.numpy as jnp
import pytest
from planned import MODEL, config_of, step_of

from demix_jax.config.schema import MeshConfig
from demix_jax.model.params import SPLITS
from demix_jax.model.transformer import hidden_states, init_tree
from demix_jax.planning.aot_compile import step_arguments
from demix_jax.planning.memory import saved_bytes, step_memory

MESHES = [
    (MeshConfig(8, 1), 8),
    (MeshConfig(2, 4), 8),
    (MeshConfig(4, 2), 9),
    (MeshConfig(2, 4, shard="optimizer"), 8),
    (MeshConfig(2, 4, shard="params"), 8),
    (MeshConfig(2, 2, model=2), 8),
    (MeshConfig(2, 2, model=2, shard="params"), 3),
    (MeshConfig(8, 1, offload_optimizer=True), 8),
]


def on_first_device(tree) -> int:
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), tree)
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(arrays)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )


def test_state_is_what_a_device_holds():
    """Shared parameters and experts, and optimizer state, of arrays that are really there."""
    for mesh, experts in MESHES:
        step = step_of(config_of(mesh), experts)
        state, batch = step_arguments(step)
        memory = step_memory(step)
        assert memory.host == (memory.optimizer.total if mesh.offload_optimizer else 0), mesh
        for half in ("shared", "experts"):
            held = on_first_device(getattr(state.params, half))
            assert getattr(memory.parameters, half) == held, (mesh, half)
            counts = 4 * (1 if half == "shared" else step.layout.padded_experts) * 2  # of updates
            found = on_first_device(getattr(state.opt_state, half))
            assert 0 < found - getattr(memory.optimizer, half) <= counts, (mesh, half)
        assert memory.batch == on_first_device(batch), mesh


def test_a_frozen_trunk_has_neither_optimizer_state_nor_gradients():
    for mesh in (MeshConfig(2, 4), MeshConfig(2, 4, shard="params")):
        config = config_of(mesh)
        plain = step_memory(step_of(config))
        config.train.init_from, config.train.freeze = "trunk", "shared"
        step = step_of(config)
        state, memory = step_arguments(step)[0], step_memory(step)
        assert memory.parameters == plain.parameters
        assert memory.parameters.shared == on_first_device(state.params.shared)
        assert memory.optimizer == (0, plain.optimizer.experts)
        assert on_first_device(state.opt_state.shared) == 0
        assert memory.gradients == (0, plain.gradients.experts)


_KERNELS = (("xla", 24), ("splash", 128))  # of attention, with a context


@pytest.mark.slow
def test_saved_activations_are_the_residuals_of_the_layers():
    """What `jax.vjp` keeps, but for the few statistics of norms and softmax."""
    cases = [
        *itertools.product(("full", "dots", "none"), ("bfloat16", "float32"), ("gpt2",), _KERNELS),
        *itertools.product(
            ("dots", "none"), ("bfloat16",), ("llama", "olmo", "qwen"), _KERNELS[:1]
        ),
    ]
    for remat, dtype, name, (kernel, context) in cases:
        changes = {"remat": remat, "dtype": dtype, "attention": kernel, "context": context}
        model = dataclasses.replace(MODEL, **decoder64.SHAPES[name] | changes)
        tree = jax.eval_shape(lambda key, model=model: init_tree(model, key), jax.random.key(0))
        tree = tree | {
            "layers": tree["layers"]
            | {
                "ffn": jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree["layers"]["ffn"]
                )
            }
        }

        def residuals(tree, tokens, model=model):
            def run(tree):
                def one(ffn, tokens):
                    full = tree | {"layers": tree["layers"] | {"ffn": ffn}}
                    return hidden_states(model, full, tokens)

                return jax.vmap(one)(tree["layers"]["ffn"], tokens)

            return jax.vjp(run, tree)[1]

        tokens = jax.ShapeDtypeStruct((1, 7, context), jnp.int32)
        leaves = jax.tree.leaves(jax.eval_shape(residuals, tree, tokens))
        kept = [
            leaf
            for leaf in leaves
            if leaf.shape[:1] == (5,)
            and 7 in leaf.shape
            and any(n % context == 0 for n in leaf.shape)
        ]  # heads that share a key are further positions
        found = sum(math.prod(x.shape) * x.dtype.itemsize for x in kept if x.shape[-1] > 1)
        assert found == sum(saved_bytes(model)) * 5 * 7 * context, (remat, dtype, name, kernel)


def test_memory_follows_from_the_split(monkeypatch):
    """However leaves are split, one device with one expert holds the same."""
    plain = step_memory(step_of(config_of(MeshConfig(1, 8)), experts=1))
    for owned in ((("layers",),), (("embed",), ("norm",)), (("layers", "attention"),)):
        monkeypatch.setitem(SPLITS, "ffn", owned)
        memory = step_memory(step_of(config_of(MeshConfig(1, 8)), experts=1))
        assert memory.device == plain.device, owned
        assert memory.parameters != plain.parameters, owned
        assert memory.activations != plain.activations, owned
