"""Attention kernels: which one is chosen, what it computes, what the program holds of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from planned import config_of, step_of

from demix_jax.config.schema import BoundModelConfig, MeshConfig, ModelConfig
from demix_jax.errors import DemixError
from demix_jax.model.attention import attend, kernel_summary, resolve_kernel
from demix_jax.planning.aot_compile import gpu_devices, lower_step, missing_compiler, trace_step
from demix_jax.planning.hardware import HARDWARE
from demix_jax.planning.planned_step import AbstractDevice, lay_out
from demix_jax.training.train import train

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
    ("cudnn", "a100", {"heads": 3}, "at most 128 on this GPU; here 256"),
    ("cudnn", "h100", {"width": 120}, "a multiple of 8 numbers, .* here 10; change model.heads"),
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


def test_the_log_says_why_not_the_fused_kernel():
    for name, changes, line in (
        ("h100", {}, "attention: cudnn"),
        ("h100", {"attention": "xla"}, "attention: xla"),
        ("v5p", {"dtype": "float32"}, "attention: splash"),
        ("a100", {"dtype": "float32"}, "attention: xla, as cudnn takes bfloat16, not model.dtype"),
    ):
        model = dataclasses.replace(MODEL, **changes)
        assert kernel_summary(model, HARDWARE[name]).startswith(line), (name, changes)
    assert not kernel_summary(MODEL, jax.devices()[0])


def test_a_kernel_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    config = tiny.config(tiny.write_prepared(tmp_path / "data", ["law", "med"]))
    config.model.attention = "cudnn"
    with pytest.raises(DemixError, match="attention cudnn is for NVIDIA GPUs, not for cpu"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_layout_holds_the_kernel_of_its_devices():
    assert step_of(config_of()).layout.model.attention == "xla"
    for name, kernel in (("h100", "cudnn"), ("v5p", "splash")):
        hardware = HARDWARE[name]
        devices = [AbstractDevice(i, hardware) for i in range(8)]
        planned = lay_out(config_of(), 8, devices, hardware)
        assert planned.layout.model.attention == kernel


def reference(q, k, v, documents, weights) -> list[np.ndarray]:
    """Causal attention within documents, and gradients of its weighted sum, in float64."""
    q, k, v, weights = (np.asarray(x, np.float64) for x in (q, k, v, weights))
    groups, scale = k.shape[2], q.shape[-1] ** -0.5
    every = np.repeat(np.arange(groups), q.shape[2] // groups)  # the head of keys of each head
    seen = np.tril(documents[:, :, None] == documents[:, None, :])[:, None]
    scores = np.where(seen, np.einsum("bthd,bshd->bhts", q, k[:, :, every]) * scale, -np.inf)
    attention = np.exp(scores - scores.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    given = np.einsum("bthd,bshd->bhts", weights, v[:, :, every])
    slopes = attention * (given - (given * attention).sum(-1, keepdims=True)) * scale
    for_keys = (
        np.einsum("bhts,bthd->bshd", slopes, q),
        np.einsum("bhts,bthd->bshd", attention, weights),
    )
    return [
        np.einsum("bhts,bshd->bthd", attention, v[:, :, every]),
        np.einsum("bhts,bshd->bthd", slopes, k[:, :, every]),
        *(x.reshape(*x.shape[:2], groups, -1, x.shape[-1]).sum(3) for x in for_keys),
    ]


@pytest.mark.slow
def test_kernels_and_their_gradients_agree_with_float64():
    """Three heads of queries to each of keys, documents, no whole number of blocks, under vmap."""
    rng = np.random.default_rng(0)
    shapes = ((2, 1, 150, heads, 8) for heads in (6, 2, 2, 6))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    documents = np.zeros((2, 1, 150), np.int32)
    documents[0, 0, 40:], documents[1, 0, 130:] = 40, 130
    same = documents[:, :, None, :, None] == documents[:, :, None, None, :]
    for kernel, mask in (("splash", documents), ("xla", same)):

        def one(q, k, v, weights, mask, kernel=kernel):
            output, pullback = jax.vjp(
                lambda *qkv: attend(kernel, *qkv, mask, interpret=True), q, k, v
            )
            return output, *pullback(weights)

        found = jax.jit(jax.vmap(one))(*arrays, mask)
        for i in range(2):
            right = reference(*(x[i] for x in arrays[:3]), documents[i], arrays[3][i])
            for mine, theirs in zip(found, right, strict=True):
                assert np.abs(mine[i] - theirs).max() < 2e-5, kernel


def lowered_for_tpus(mesh: MeshConfig, **model) -> str:
    """The train step of eight simulated devices as it would be lowered for TPUs."""
    step = step_of(config_of(mesh, context=256, **model))
    shape = dataclasses.replace(step.layout.model, attention="splash")
    step = dataclasses.replace(step, layout=dataclasses.replace(step.layout, model=shape))
    return trace_step(step).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.slow
def test_a_step_for_tpus_holds_splash_in_place_of_the_weights():
    """Forward, again where everything is recomputed, and two kernels of the backward pass."""
    text = lowered_for_tpus(MeshConfig(4, 2), remat="full", expert_owns="all")
    assert text.count(SPLASH) == 4
    assert "splash_mha_fwd_residuals" in text
    assert "256x256x" not in text


@pytest.mark.slow
def test_documents_reach_splash_as_segments_and_dots_saves_its_output():
    mesh = MeshConfig(2, 2, model=2, shard="params")
    text = lowered_for_tpus(mesh, remat="dots", document_mask=True)
    assert text.count(SPLASH) == 3
    assert "splash_mha_fwd_segmented" in text


@pytest.mark.skipif(bool(missing_compiler("h100", "")), reason="needs JAX's CUDA plugin")
def test_a_step_for_gpus_holds_cudnn_in_place_of_the_weights():
    """What experts own decides which axes of queries, keys and values are folded."""
    devices = gpu_devices("h100", 8, 8)
    for owns, remat, forward in (("ffn", "dots", 1), ("all", "full", 2)):
        config = config_of(context=256, remat=remat, expert_owns=owns)
        text = lower_step(lay_out(config, 8, devices, HARDWARE["h100"])).as_text()
        assert text.count(CUDNN) == forward, owns
        assert text.count(CUDNN_BACKWARD) == 1, owns
        assert "256x256x" not in text, owns
