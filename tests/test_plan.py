"""Plans against what there is: arrays on devices, residuals, programs, and compilers."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from demix_jax.config.schema import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from demix_jax.errors import DemixError
from demix_jax.model.transformer import hidden_states, init_expert, init_trunk, token_logprobs
from demix_jax.planning.aot_compile import (
    compile_step,
    gpu_devices,
    missing_compiler,
    step_arguments,
    topology_devices,
)
from demix_jax.planning.hardware import HARDWARE, find_topology, ring_bandwidth
from demix_jax.planning.memory import saved_bytes
from demix_jax.planning.planner import (
    AbstractDevice,
    Domains,
    PlannedStep,
    lay_out,
    make_plan,
    out_of_memory_message,
)
from demix_jax.planning.roofline import token_flops
from demix_jax.planning.tables import plan_json, plan_text

MODEL = ModelConfig(layers=5, width=32, heads=4, context=24, vocab_size=96, dtype="bfloat16")
NAMES = tuple("abcdefgh")


def config_of(mesh: MeshConfig | None = None, variant: str = "demix", batch: int = 16, **model):
    return Config(
        variant=variant,
        model=dataclasses.replace(MODEL, **model),
        data=DataConfig(dir="nothing/here", train_domains=NAMES),
        train=TrainConfig(batch_size=batch, grad_accum_steps=2),
        mesh=mesh or MeshConfig(),
    )


estimate = functools.partial(make_plan, compiled=False)


def step_of(config: Config, experts: int = 8) -> PlannedStep:
    return lay_out(config, Domains(experts, (), 96), jax.devices()[:8], HARDWARE["h100"])


# Memory.


@pytest.mark.parametrize(
    ("mesh", "experts"),
    [
        (MeshConfig(8, 1), 8),
        (MeshConfig(2, 4), 8),
        (MeshConfig(4, 2), 9),
        (MeshConfig(2, 4, shard="optimizer"), 8),
        (MeshConfig(2, 4, shard="params"), 8),
        (MeshConfig(2, 2, model=2), 8),
        (MeshConfig(2, 2, model=2, shard="params"), 3),
        (MeshConfig(8, 1, offload_optimizer=True), 8),
    ],
    ids=str,
)
def test_state_is_what_a_device_holds(mesh, experts):
    """Trunk and experts, parameters and moments, of arrays that are really there."""
    step = step_of(config_of(mesh), experts)
    state, batch = step_arguments(step.config, step.layout, step.shape)

    def here(tree):
        arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), tree)
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(arrays)
            for shard in leaf.addressable_shards
            if shard.device == jax.devices()[0]
        )

    memory = step.footprint()
    assert memory.host == (memory.optimizer.total if mesh.offload_optimizer else 0)
    for half in ("shared", "experts"):
        assert getattr(memory.parameters, half) == here(getattr(state.params, half))
        counts = 4 * (1 if half == "shared" else step.layout.padded) * 2  # of updates
        found = here(getattr(state.optimizer, half))
        assert 0 < found - getattr(memory.optimizer, half) <= counts
    assert memory.batch == here(batch)


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_saved_activations_are_the_residuals_of_the_layers(remat, dtype):
    """What `jax.vjp` keeps, but for the few statistics of norms and softmax."""
    model = dataclasses.replace(MODEL, remat=remat, dtype=dtype)
    trunk = jax.eval_shape(functools.partial(init_trunk, model), jax.random.key(0))
    expert = jax.eval_shape(functools.partial(init_expert, model), jax.random.key(0))
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), expert)

    def residuals(trunk, stack, tokens):
        def run(trunk, stack):
            return jax.vmap(lambda e, t: hidden_states(model, trunk, e, t))(stack, tokens)

        return jax.vjp(run, trunk, stack)[1]

    tokens = jax.ShapeDtypeStruct((1, 7, 24), jnp.int32)
    leaves = jax.tree.leaves(jax.eval_shape(residuals, trunk, stack, tokens))
    kept = [leaf for leaf in leaves if leaf.shape[:1] == (5,) and {7, 24} <= set(leaf.shape)]
    found = sum(math.prod(x.shape) * x.dtype.itemsize for x in kept if x.shape[-1] > 1)
    assert found == saved_bytes(model).total * 5 * 7 * 24


@pytest.mark.parametrize(("variant", "batch"), [("demix", 48), ("dense_balanced", 16)])
def test_the_largest_batch_fits_and_a_larger_one_does_not(variant, batch):
    plan = estimate(config_of(variant=variant, batch=batch), devices=8, hardware="v5e")
    step, most = plan.step, plan.largest
    folded = 1 if variant == "demix" else 8
    at_once = most.batch * folded // step.ways
    assert step.footprint(at_once, 1).device <= plan.hardware.hbm
    assert step.footprint(at_once + 1, 1).device > plan.hardware.hbm
    assert step.footprint(most.micro, 2).device <= plan.hardware.hbm
    assert step.footprint(most.micro + 1, 2).device > plan.hardware.hbm
    assert most.grad_accum_steps == 1


def test_advice_fits_when_it_is_followed():
    wide = {"layers": 24, "width": 2048, "heads": 32, "context": 1024, "vocab_size": 50_257}
    config = config_of(MeshConfig(), batch=256, remat="dots", logits_chunk=128, **wide)
    config.train.grad_accum_steps = 1
    plan = estimate(config, devices=256, hardware="v5e")
    line = out_of_memory_message(plan)
    assert f"{plan.excess / 2**30:.1f} too many" in line
    flags = line.split("; or ")[0].split("use ")[1].split()
    for flag in flags:
        key, value = flag.removeprefix("--config.").split("=")
        section, name = key.split(".")
        kind = type(getattr(getattr(config, section), name))
        setattr(getattr(config, section), name, kind(value))
    assert not estimate(config, devices=256, hardware="v5e").excess


# Time.


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("chunk", [0, 8])
def test_flops_are_those_of_the_products_in_the_program(remat, chunk):
    """Every matrix product that JAX asks for, loops counted."""
    model = dataclasses.replace(MODEL, remat=remat, logits_chunk=chunk)
    trunk, expert = (
        jax.eval_shape(functools.partial(init, model), jax.random.key(0))
        for init in (init_trunk, init_expert)
    )
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), expert)
    tokens = jax.ShapeDtypeStruct((1, 7, 24), jnp.int32)

    def loss(trunk, stack, tokens):
        one = functools.partial(token_logprobs, model, trunk)
        return jax.vmap(lambda e, t: one(e, t, t))(stack, tokens).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(trunk, stack, tokens)
    assert products(jaxpr.jaxpr) == token_flops(model).program * 7 * 24


def products(jaxpr) -> int:
    """Floating-point operations of all dot_generals."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            contracted, _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[d] for d in contracted[0])
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        for inner in jax.core.jaxprs_in_params(equation.params):
            total += times * products(inner)
    return total


def test_mfu_is_what_the_time_says():
    plan = estimate(config_of(), devices=16)
    asked = token_flops(plan.step.layout.model).model * 16 * 8 * 24
    assert plan.time.mfu == pytest.approx(asked / (plan.time.total * 16 * 989e12))
    assert plan.time.tokens * plan.time.total * 16 == pytest.approx(16 * 8 * 24)


def test_empty_places_take_time_and_give_nothing():
    """Nine experts in eight groups of one device: as long as sixteen, text of nine."""
    nine, sixteen = (
        estimate(config_of(MeshConfig(domain=8)), experts=n, devices=8) for n in (9, 16)
    )
    assert nine.time.compute == sixteen.time.compute
    assert nine.step.text == 9 * 16 * 24
    assert nine.memory.device == sixteen.memory.device


@pytest.mark.parametrize(
    ("devices", "share"), [(range(8), 9), (range(0, 64, 8), 1), (range(0, 64, 2), 4)]
)
def test_rings_across_nodes_use_the_ports_of_their_members(devices, share):
    h100 = HARDWARE["h100"]
    assert ring_bandwidth(h100, list(devices)) == min(h100.link, share * h100.network)


def test_a_slice_has_no_nodes():
    hardware, size = find_topology("v5e:16x16")
    assert size == 256
    assert ring_bandwidth(hardware, range(256)) == hardware.link


# What is refused.


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({}, {"topology": "v5x:4x4"}, "unknown topology 'v5x:4x4'; there are v5e:2x2, 2x4"),
        ({}, {"topology": "v5p:3x3x3"}, "unknown topology 'v5p:3x3x3'"),
        ({}, {"devices": 8, "hardware": "h10"}, "unknown hardware 'h10'; choose from h100, a100"),
        ({}, {}, "say what to plan for"),
        ({}, {"devices": 8, "topology": "v5e:2x4"}, "one of them"),
        ({"mesh": MeshConfig(domain=3)}, {"devices": 8}, "does not fit 8 experts on 8 devices"),
        ({"vocab_size": 0}, {"devices": 8}, "model.vocab_size is 0 and nothing/here holds no"),
    ],
    ids=["kind", "shape", "hardware", "nothing", "both", "mesh", "vocabulary"],
)
def test_what_is_refused(change, where, message):
    with pytest.raises(DemixError, match=message):
        make_plan(config_of(**change), **where)


def test_a_step_without_domains_is_refused():
    config = config_of()
    config.data.train_domains = ()
    with pytest.raises(DemixError, match="data.train_domains is empty .* give --experts"):
        make_plan(config, devices=8)


# What is printed.


def test_text_and_json_say_the_same():
    plan = estimate(config_of(), devices=16)
    text, values = plan_text(plan), json.loads(json.dumps(plan_json(plan)))
    assert values["mesh"] == {"domain": 8, "data": 2, "model": 1}
    assert f"{values['seconds']['step']:.3g} s, MFU {100 * values['mfu']:.0f} %" in text
    assert sum(values["seconds"][k] for k in ("compute", "memory", "sums", "layers")) == (
        pytest.approx(values["seconds"]["step"])
    )
    memory = values["memory"]
    parts = ("parameters", "optimizer", "gradients", "copies", "activations")
    halves = sum(sum(memory[part].values()) for part in parts)
    assert halves + memory["tokens"] == pytest.approx(memory["device"])


@pytest.mark.slow
def test_the_verb(tmp_path):
    file = tmp_path / "plan.json"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "demix_jax", "plan", "--experts", "8", "--nocompile"]
    command += ["--config", str(root / "configs" / "paper_1300m.py"), "--out", str(file)]
    fits = subprocess.run([*command, "--devices", "128"], capture_output=True, text=True)
    assert fits.returncode == 0, fits.stderr
    assert "step time" in fits.stdout
    assert json.loads(file.read_text())["fits"]
    small = [*command, "--devices", "8", "--hardware", "v5e"]
    refused = subprocess.run(small, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("demix plan: error: the step does not fit")
    assert refused.stderr.count("\n") == 1


# Compilers need no accelerator.


def agrees(step: PlannedStep) -> None:
    found, memory = compile_step(step.config, step.layout, 8, step.shape), step.footprint()
    state = memory.parameters.total + memory.optimizer.total + memory.batch
    assert found.fits
    assert found.arguments == pytest.approx(state, rel=0.01)
    assert found.peak == pytest.approx(memory.device, rel=0.1)


def small(mesh: MeshConfig) -> Config:
    shape = {"layers": 4, "width": 512, "heads": 8, "context": 1024, "vocab_size": 8192}
    return config_of(mesh, batch=32, remat="dots", logits_chunk=128, **shape)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_compiler("v5e", "v5e:2x4")), reason="needs libtpu")
@pytest.mark.parametrize("mesh", [MeshConfig(8, 1), MeshConfig(2, 4, shard="params")], ids=str)
@pytest.mark.parametrize("where", ["v5e:2x4", "v5p:2x2x2"])
def test_the_compiler_for_tpus_agrees(mesh, where):
    agrees(lay_out(small(mesh), Domains(8, (), 8192), topology_devices(where), HARDWARE[where[:3]]))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_compiler("h100", "")), reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize(
    "mesh", [MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(8, 1, offload_optimizer=True)], ids=str
)
def test_the_compiler_for_gpus_agrees(mesh):
    agrees(lay_out(small(mesh), Domains(8, (), 8192), gpu_devices("h100", 8, 8), HARDWARE["h100"]))


@pytest.mark.parametrize(
    ("hardware", "topology", "message"),
    [("v100", "", "no compiler for a number of v100"), ("v5p", "", "TPUs need --topology")],
)
def test_what_cannot_be_compiled_for(hardware, topology, message):
    assert message in missing_compiler(hardware, topology)


def test_stand_ins_make_the_mesh_of_real_devices():
    config, domains = config_of(), Domains(8, (), 96)
    planned = lay_out(config, domains, [AbstractDevice(i) for i in range(8)], HARDWARE["h100"])
    assert planned.layout.mesh.shape == step_of(config).layout.mesh.shape
    assert planned.footprint() == step_of(config).footprint()
