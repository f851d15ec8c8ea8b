"""FLOPs and time of a step against the products of programs, and links of hardware."""

import dataclasses
import functools
import itertools
import math

import decoder64
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval
from planned import MODEL, config_of

from demix_jax.config.schema import MeshConfig
from demix_jax.data.batch import Batch
from demix_jax.model.params import Params, param_shapes
from demix_jax.planning.hardware import HARDWARE, find_topology, ring_bandwidth
from demix_jax.planning.planned_step import AbstractDevice, lay_out
from demix_jax.planning.planner import make_plan
from demix_jax.planning.roofline import token_flops, trained_products
from demix_jax.training.train_step import batch_loss

estimate = functools.partial(make_plan, compiled=False)


@pytest.mark.slow
def test_flops_are_those_of_the_products_in_the_program():
    """Every matrix product that JAX asks for, loops counted."""
    for remat, (name, chunk) in itertools.product(
        ("none", "dots", "full"), (("gpt2", 0), ("gpt2", 8), ("llama", 0), ("olmo", 0))
    ):
        model = dataclasses.replace(MODEL, **decoder64.SHAPES[name])
        model = dataclasses.replace(model, remat=remat, logits_chunk=chunk)

        def loss(params, batch, model=model):
            return batch_loss(model, params, batch, 1.0 * batch.mask)[0]

        shapes = {"tokens": ((1, 7, 25), jnp.int32), "mask": ((1, 7, 24), bool)}
        arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        batch = Batch(**arrays, domain=None)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(param_shapes(model, 1), batch)
        found = products(jaxpr.jaxpr)
        assert found == token_flops(model).program * 7 * 24, (remat, chunk, name)


@pytest.mark.slow
def test_gradients_of_a_frozen_trunk_are_no_products_of_the_program():
    """Each row of ownership, with the shared half as a constant of the gradient."""
    for owned, name in (("ffn", "gpt2"), ("ffn", "llama"), ("ffn+embeddings", "gpt2")):
        shape = decoder64.SHAPES[name] | {"expert_owns": owned, "attention": "xla"}
        config = config_of(MeshConfig(1, 1), batch=2, **shape)
        config.train.init_from, config.train.freeze = "trunk", "shared"
        step = lay_out(config, 1, [AbstractDevice(0, HARDWARE["h100"])], HARDWARE["h100"])
        model = step.layout.model

        def loss(experts, shared, batch, model=model):
            return batch_loss(model, Params(shared, experts), batch, 1.0 * batch.mask)[0]

        shapes = {"tokens": ((1, 7, 25), jnp.int32), "mask": ((1, 7, 24), bool)}
        arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        shared, experts = param_shapes(model, 1)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(experts, shared, Batch(**arrays, domain=None)).jaxpr
        # As the compiler does: loops compute the gradient of what is frozen, and nothing uses it.
        used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        found = products(used)
        asked = token_flops(model, trained_products(step))
        assert found == asked.program * 7 * 24, (owned, name)
        assert asked.model < token_flops(model).model


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
        inner = [products(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":  # of platforms, which do the same
            inner = [max(inner)]
        total += times * sum(inner)
    return total


def test_mfu_is_what_the_time_says():
    plan = estimate(config_of(), devices=16)
    asked = token_flops(plan.step.layout.model).model * 16 * 8 * 24
    assert plan.time.mfu == pytest.approx(asked / (plan.time.total * 16 * 989e12))
    assert plan.time.tokens_per_second * plan.time.total * 16 == pytest.approx(16 * 8 * 24)


def test_empty_experts_take_time_and_give_nothing():
    """Nine experts in eight groups of one device: as long as sixteen, tokens of nine."""
    nine, sixteen = (
        estimate(config_of(MeshConfig(domain=8)), experts=n, devices=8) for n in (9, 16)
    )
    assert nine.time.compute == sixteen.time.compute
    assert nine.step.tokens == 9 * 16 * 24
    assert nine.memory.device == sixteen.memory.device


def test_rings_across_nodes_use_the_ports_of_their_members():
    h100 = HARDWARE["h100"]
    for devices, ports in ((range(8), 9), (range(0, 64, 8), 1), (range(0, 64, 2), 4)):
        assert ring_bandwidth(h100, list(devices)) == min(h100.link, ports * h100.network), devices


def test_a_slice_has_no_nodes():
    hardware, size = find_topology("v5e:16x16")
    assert size == 256
    assert ring_bandwidth(hardware, range(256)) == hardware.link
