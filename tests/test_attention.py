"""Attention kernels: which one is chosen, what it computes, what the program holds of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import config_of, step_of

from demix_jax.config.schema import BoundModelConfig, MeshConfig, ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.attention import attend, resolve_kernel
from demix_jax.planning.aot_compile import (
    trace_step,
)
from demix_jax.planning.hardware import HARDWARE
from demix_jax.planning.planned_step import AbstractDevice, lay_out

MODEL = ModelConfig(width=768, heads=12, dtype="bfloat16")
SPLASH = "custom_call @tpu_custom_call"
CUDNN, CUDNN_BACKWARD = "@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("


def labelled(domains: int, **changes) -> BoundModelConfig:
    values = vars(MODEL) | {"vocab_size": 300 + domains, "document_mask": True} | changes
    return BoundModelConfig(**values, eod=0, text_ids=300)


# Hardware, changes of the model, the kernel that auto means.
AUTO = [
    ("h100", {}, "cudnn"),
    ("a100", {}, "cudnn"),
    ("v100", {}, "xla"),
    ("h100", {"dtype": "float32"}, "xla"),
    ("h100", {"heads": 3}, "cudnn"),  # 256
    ("a100", {"heads": 3}, "xla"),
    ("h100", {"width": 120}, "xla"),  # 10
    ("h100", {"document_mask": True}, "xla"),
    ("v5p", {}, "splash"),
    ("v5e", {"dtype": "float32", "heads": 3}, "splash"),
    ("v5p", {"document_mask": True}, "splash"),
]
# Kernel, hardware, changes of the model, what the error says.
REFUSED = [
    ("cudnn", "v5p", {}, "attention cudnn is for NVIDIA GPUs, not for tpu; use auto or xla"),
    ("splash", "h100", {}, "attention splash is for TPUs, not for gpu; use auto or xla"),
    ("cudnn", "v100", {}, r"needs compute capability 8.0 \(A100\) or more, not 7.0"),
    ("cudnn", "h100", {"dtype": "float32"}, "takes bfloat16, not model.dtype float32; use bfloat"),
    ("cudnn", "a100", {"heads": 3}, "at most 128 on this GPU; .* 768 / model.heads 3 is 256"),
    ("cudnn", "h100", {"width": 120}, "a multiple of 8 numbers, .* is 10; change model.heads"),
    ("cudnn", "h100", {"document_mask": True}, "cannot mask documents .* use auto or xla"),
]


def test_auto_is_the_fused_kernel_where_it_fits():
    for name, changes, kernel in AUTO:
        model = dataclasses.replace(MODEL, **changes)
        assert resolve_kernel(model, HARDWARE[name]) == kernel, (name, changes)
        named = dataclasses.replace(model, attention=kernel)
        assert resolve_kernel(named, HARDWARE[name]) == kernel, (name, changes)
    assert resolve_kernel(MODEL, jax.devices()[0]) == "xla"


def test_a_kernel_that_is_named_and_does_not_fit_is_refused():
    for kernel, name, changes, message in REFUSED:
        model = dataclasses.replace(MODEL, attention=kernel, **changes)
        with pytest.raises(DemixError, match=message) as error:
            resolve_kernel(model, HARDWARE[name])
        assert "\n" not in str(error.value), kernel
    with pytest.raises(DemixError, match="attention splash is for TPUs, not for cpu"):
        resolve_kernel(dataclasses.replace(MODEL, attention="splash"), jax.devices()[0])


def test_splash_cannot_show_a_domain_token_to_every_document():
    assert resolve_kernel(labelled(0), HARDWARE["v5p"]) == "splash"
    assert resolve_kernel(labelled(2), HARDWARE["v5p"]) == "xla"
    with pytest.raises(DemixError, match="cannot show a domain token to every document"):
        resolve_kernel(labelled(2, attention="splash"), HARDWARE["v5p"])


def test_a_layout_holds_the_kernel_of_its_devices():
    assert step_of(config_of()).layout.model.attention == "xla"
    for name, kernel in (("h100", "cudnn"), ("v5p", "splash")):
        hardware = HARDWARE[name]
        devices = [AbstractDevice(i, hardware) for i in range(8)]
        planned = lay_out(config_of(), 8, devices, hardware)
        assert planned.layout.model.attention == kernel


def reference(q, k, v, documents) -> np.ndarray:
    """Causal attention within documents, a query and head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    found = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        own = h * k.shape[2] // q.shape[2]
        seen = [s for s in range(t + 1) if documents[b, s] == documents[b, t]]
        scores = k[b, seen, own] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        found[b, t, h] = weights / weights.sum() @ v[b, seen, own]
    return found


def heads_of(length: int, heads: int, groups: int, size: int):
    rng = np.random.default_rng(length)
    shapes = ((2, length, n, size) for n in (heads, groups, groups, heads))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


# Length, heads, heads of keys, head size, documents.
CASES = [(20, 2, 2, 8, False), (150, 4, 2, 8, True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_float64(case):
    """Splash as ordinary operations, with a length that is no multiple of its blocks."""
    length, heads, groups, size, packed = case
    q, k, v, _ = heads_of(length, heads, groups, size)
    documents = np.zeros((2, length), np.int32)
    if packed:
        documents[0, 40:] = 40
        documents[1, 130:] = 130
    right = reference(q, k, v, documents)
    same = jnp.asarray(documents[:, None, :, None] == documents[:, None, None, :])
    assert np.abs(attend("xla", q, k, v, same) - right).max() < 1e-5
    found = attend("splash", q, k, v, jnp.asarray(documents) if packed else None, interpret=True)
    assert np.abs(found - right).max() < 1e-5


def test_gradients_of_splash_are_those_of_xla():
    """Under vmap, over what attention's experts would be, with keys of fewer heads."""
    q, k, v, weights = heads_of(130, 4, 2, 8)
    documents = jnp.asarray(np.arange(130) // 70)[None].repeat(2, 0)
    same = documents[:, None, :, None] == documents[:, None, None, :]

    def loss(kernel, mask, q, k, v):
        return (attend(kernel, q, k, v, mask, interpret=True) * weights).sum()

    def gradients(kernel, mask):
        one = jax.grad(functools.partial(loss, kernel, mask), argnums=(0, 1, 2))
        return jax.vmap(one)(*(jnp.stack([x, x[::-1]]) for x in (q, k, v)))

    found = gradients("splash", documents)
    for mine, right in zip(found, gradients("xla", same), strict=True):
        assert np.abs(mine - right).max() < 1e-4


def lowered_for_tpus(mesh: MeshConfig, **model) -> str:
    """The train step of four simulated devices as it would be lowered for TPUs."""
    step = step_of(config_of(mesh, **model))
    shape = dataclasses.replace(step.layout.model, attention="splash")
    step = dataclasses.replace(step, layout=dataclasses.replace(step.layout, model=shape))
    return trace_step(step).lower(lowering_platforms=("tpu",)).as_text()


def test_a_step_for_tpus_holds_splash_once_a_pass():
    """Forward, and two kernels of the backward pass, which `dots` does not let run it again."""
    for owns, remat, calls in (("ffn", "dots", 3), ("ffn", "full", 4), ("all", "none", 3)):
        text = lowered_for_tpus(MeshConfig(4, 2), remat=remat, expert_owns=owns, context=128)
        assert text.count(SPLASH) == calls, (owns, remat)
    assert "splash_mha_fwd_segmented" not in text


def test_documents_reach_splash_as_segments():
    text = lowered_for_tpus(MeshConfig(2, 2, model=2, shard="params"), document_mask=True)
    assert text.count(SPLASH) == 3
    assert "splash_mha_fwd_segmented" in text
