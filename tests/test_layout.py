"""Shardings of parameters and optimizer state: what every device holds of them."""

import dataclasses
import math
from typing import Any

import decoder64
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from demix_jax.config.schema import MeshConfig, ModelConfig, OptimConfig
from demix_jax.errors import DemixError
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(layers=2, width=8, heads=2, context=6, vocab_size=13)


def layout_of(experts: int, devices: int, *, shapes: ModelConfig = MODEL, **options: Any) -> Layout:
    config = MeshConfig(**options)
    mesh = make_mesh(config, experts, jax.devices()[:devices])
    return make_layout(config, mesh, shapes, experts)


def held_experts(layout: Layout) -> dict[jax.Device, list[int]]:
    """The experts that every device has a number of; -1 is an empty place."""
    numbers = np.arange(layout.padded_experts)
    numbers = np.where(numbers < layout.experts, numbers, -1)
    found = {device: [] for device in layout.mesh.devices.flat}
    for leaf, sharding in zip(
        *map(jax.tree.leaves, (layout.shapes.experts, layout.params_sharding.experts)), strict=True
    ):
        whole = np.broadcast_to(numbers.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)
        for shard in jax.device_put(whole, sharding).addressable_shards:
            rows = np.asarray(shard.data).reshape(shard.data.shape[0], -1)
            assert (rows == rows[:, :1]).all()
            found[shard.device].append(rows[:, 0].tolist())
    assert all(rows == leaves[0] for leaves in found.values() for rows in leaves)
    return {device: leaves[0] for device, leaves in found.items()}


# Experts, devices, and what is asked for.
HELD = [
    (8, 1, {}),
    (8, 8, {}),
    (5, 3, {}),
    (3, 2, {}),
    (9, 8, {}),
    (8, 6, {}),
    (1, 8, {}),
    (9, 8, {"domain": 8}),
    (6, 8, {"domain": 4, "data": 2}),
    (5, 8, {"domain": 2, "model": 2}),
    (5, 4, {"domain": 4, "shard": "params"}),
    (6, 8, {"domain": 4, "shard": "params"}),
]


def test_an_expert_is_on_one_group_of_the_mesh_and_on_all_of_it():
    """No expert is lost, and every device holds equally many."""
    for experts, devices, options in HELD:
        layout = layout_of(experts, devices, **options)
        held = held_experts(layout)
        assert len(held) == devices
        assert len({len(numbers) for numbers in held.values()}) == 1
        groups = [[held[device] for device in group.flat] for group in layout.mesh.devices]
        assert all(numbers == group[0] for group in groups for numbers in group)
        empty = [-1] * (layout.padded_experts - experts)
        assert sum((group[0] for group in groups), []) == [*range(experts), *empty], options


def test_every_group_has_room_for_as_many_experts_as_the_fullest():
    cases = {(9, 8): 16, (6, 4): 8, (5, 4): 8, (5, 2): 6, (8, 8): 8, (9, 1): 9}
    for (experts, domain), padded in cases.items():
        assert layout_of(experts, 8, domain=domain).padded_experts == padded, (experts, domain)


def test_shared_parameters_are_on_every_device():
    for experts, devices in [(8, 8), (4, 8), (5, 3), (1, 8)]:
        for sharding in jax.tree.leaves(layout_of(experts, devices).params_sharding.shared):
            assert sharding.is_fully_replicated
            assert len(sharding.device_set) == devices


def test_a_single_expert_is_on_every_device_of_a_mesh_for_many():
    """The steps before branching run on the mesh of the experts that follow."""
    layout = make_layout(MeshConfig(), layout_of(4, 8).mesh, MODEL, 1)
    assert layout.padded_experts == 1
    assert all(s.is_fully_replicated for s in jax.tree.leaves(layout.params_sharding))


# Heads, width, context and positions whose logits exist at once.
SIZES = [(4, 12, 8, 0), (6, 12, 8, 0), (4, 8, 6, 0), (8, 16, 8, 2), (8, 16, 8, 4), (4, 8, 8, 8)]


@pytest.mark.parametrize(("heads", "width", "context", "chunk"), SIZES, ids=str)
def test_a_model_that_does_not_divide_is_refused_with_all_ways_that_do(
    heads, width, context, chunk
):
    """Compared with dividing heads, positions and chunks of these for every number of devices."""
    shapes = ModelConfig(2, width, heads, context=context, vocab_size=13, logits_chunk=chunk)
    fit = [
        n
        for n in range(1, 9)
        if heads % n == context % n == 0
        and (not chunk or (context // n) % min(chunk, context // n) == 0)
    ]
    for n in range(1, 9):
        if n in fit:
            layout_of(1, n, shapes=shapes, model=n)
            continue
        with pytest.raises(DemixError, match=f"mesh.model {n} does not divide {heads} heads") as e:
            layout_of(1, n, shapes=shapes, model=n)
        assert str(e.value).rpartition("use ")[2] == ", ".join(map(str, fit))


def test_heads_of_keys_must_divide_too():
    """A device has a head of keys together with the heads of queries that it serves."""
    shapes = dataclasses.replace(MODEL, **decoder64.LLAMA)
    layout_of(1, 2, shapes=shapes, model=2)
    with pytest.raises(
        DemixError, match="mesh.model 4 does not divide 2 heads of keys .*use 1, 2$"
    ):
        layout_of(1, 4, shapes=shapes, model=4)
    with pytest.raises(DemixError, match="mesh.model 2 does not divide 1 heads of keys .*use 1$"):
        layout_of(1, 2, shapes=dataclasses.replace(MODEL, **decoder64.QWEN), model=2)


def test_a_norm_over_all_heads_is_sharded_with_them_and_one_over_each_is_not():
    for name, spec in (("olmo", (None, "model")), ("qwen", ())):
        shapes = dataclasses.replace(MODEL, **decoder64.SHAPES[name] | {"kv_heads": 2})
        attention = layout_of(1, 2, shapes=shapes, model=2).params.shared["layers"]["attention"]
        for norm in ("q_norm", "k_norm"):
            assert attention[norm]["scale"] == PartitionSpec(*spec), (name, norm)


# The dimension of heads or hidden units of leaves that have one.
UNITS = {
    "attention/qkv/kernel": 3,
    "attention/qkv/bias": 2,
    "attention/out/kernel": 1,
    "ffn/up/kernel": 3,
    "ffn/up/bias": 2,
    "ffn/down/kernel": 2,
}
# Experts, devices, and mesh settings.
LAYOUTS = [
    (8, 8, {}),
    (4, 8, {}),
    (1, 8, {}),
    (9, 8, {"domain": 8}),
    (5, 8, {"domain": 4}),
    (4, 8, {"domain": 2, "model": 2}),
    (4, 4, {"domain": 1, "data": 2, "model": 2}),
    (1, 8, {"model": 2}),
    (3, 6, {}),
]


def leaves_of(layout: Layout, specs: Params) -> list[tuple[str, str, Any, Any]]:
    """Half, name, shape and sharding of every leaf."""
    found = []
    for half in Params._fields:
        shapes = jax.tree.leaves_with_path(getattr(layout.shapes, half))
        shardings = jax.tree.leaves(getattr(layout.shardings(specs), half))
        for (path, leaf), sharding in zip(shapes, shardings, strict=True):
            found.append((half, "/".join(key.key for key in path), leaf, sharding))
    return found


def copies(leaf: Any, sharding: Any) -> set[int]:
    """On how many devices each number of a leaf is, counted on a real array."""
    held = np.zeros(leaf.size, int)
    numbers = np.arange(leaf.size).reshape(leaf.shape)
    for shard in jax.device_put(numbers, sharding).addressable_shards:
        np.add.at(held, np.asarray(shard.data).ravel(), 1)
    return set(held.tolist())


def expected_copies(layout: Layout, half: str, name: str, leaf: Any, *, shard: bool) -> int:
    """From the definitions: axes that cut, then devices that share what they have copies of."""
    domain, data, model = layout.mesh.devices.shape
    key = name.removeprefix("layers/")
    shape, first = list(leaf.shape), int(name.startswith("layers"))
    copies = domain * data * model
    if half == "experts":
        first = 2
        if layout.experts > 1:
            copies //= domain
    if key in UNITS:
        shape[UNITS[key]] //= model
        copies //= model
    alone = half == "experts" and layout.experts > 1
    for ways in ((data,) if alone else (domain * data, data)) if shard else ():
        if any(size % ways == 0 for size in shape[first:]):
            return copies // ways
    return copies


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "optimizer", "params"])
@pytest.mark.parametrize(("experts", "devices", "options"), LAYOUTS, ids=str)
def test_every_number_is_on_as_many_devices_as_the_layout_says(experts, devices, options, shard):
    """Of parameters and of the optimizer's state."""
    layout = layout_of(experts, devices, **options, shard=shard)
    for specs, shared in ((layout.params, shard == "params"), (layout.state, shard != "none")):
        for half, name, leaf, sharding in leaves_of(layout, specs):
            expected = expected_copies(layout, half, name, leaf, shard=shared)
            assert copies(leaf, sharding) == {expected}, name
            held = math.prod(sharding.shard_shape(leaf.shape)) * devices
            assert held == leaf.size * expected, name


@pytest.mark.parametrize("shard", ["none", "params"])
def test_devices_that_share_a_layer_have_whole_heads_of_it(shard):
    """Of queries, keys and values as of the rows that join them; and likewise of hidden units."""
    shapes = ModelConfig(layers=1, width=24, heads=4, context=8, vocab_size=13)
    layout = layout_of(2, 8, shapes=shapes, domain=2, model=2, shard=shard)
    units = {"attention": np.arange(24) // 6, "ffn": np.arange(96)}
    found = {}
    for _, name, leaf, sharding in leaves_of(layout, layout.params):
        key = name.removeprefix("layers/")
        if key in UNITS:
            of = units[key.partition("/")[0]]
            at = [1] * leaf.ndim
            at[UNITS[key]] = len(of)
            whole = jax.device_put(np.broadcast_to(of.reshape(at), leaf.shape), sharding)
            for shard_ in whole.addressable_shards:
                part = found.setdefault((key.partition("/")[0], shard_.device), [])
                part.append(set(np.unique(shard_.data).tolist()))
    for place in np.ndindex(layout.mesh.devices.shape):
        device, n = layout.mesh.devices[place], place[2]
        heads, hidden = {2 * n, 2 * n + 1}, set(range(48 * n, 48 * n + 48))
        assert all(part <= heads for part in found["attention", device])
        assert all(part <= hidden for part in found["ffn", device])


# The optimizer's state.

OPTIMIZER = make_optimizer(OptimConfig(), steps=10)
BOTH = Params(True, True)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "optimizer", "params"])
@pytest.mark.parametrize(("experts", "devices", "options"), LAYOUTS, ids=str)
def test_optimizer_state_is_sharded_as_gradients_are(experts, devices, options, shard):
    layout = layout_of(experts, devices, **options, shard=shard)
    state = jax.eval_shape(lambda p: init_optimizer(OPTIMIZER, p), layout.shapes)
    shardings = layout.optimizer_sharding(OPTIMIZER, BOTH)
    for half, moments, to in zip(Params._fields, state, shardings, strict=True):
        gradients = {}
        for _, name, leaf, sharding in leaves_of(layout, layout.state):
            gradients[name, leaf.shape] = sharding
        seen = 0
        pairs = zip(jax.tree.leaves_with_path(moments), jax.tree.leaves(to), strict=True)
        for (path, leaf), sharding in pairs:
            keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            if not keys:  # a count
                ways = layout.groups if half == "experts" else 1
                size = int(np.prod(leaf.shape, dtype=int))
                assert math.prod(sharding.shard_shape(leaf.shape)) == size // ways
                continue
            seen += 1
            assert sharding == gradients["/".join(keys), leaf.shape]
        assert seen == 2 * len(jax.tree.leaves(getattr(layout.shapes, half)))


def test_a_frozen_half_has_no_state():
    layout = layout_of(4, 8, domain=2)
    assert layout.optimizer_sharding(OPTIMIZER, Params(None, True)).shared is None
    assert layout.optimizer_sharding(OPTIMIZER, Params(True, None)).experts is None


@pytest.mark.parametrize(
    ("offload", "kind", "memory"),
    [
        (True, None, "pinned_host"),
        (True, "device", "device"),
        (False, None, ""),
    ],
)
def test_offloaded_state_is_in_the_hosts_memory_between_steps(offload, kind, memory):
    layout = layout_of(4, 8, domain=2, offload_optimizer=offload)
    to = layout.optimizer_sharding(OPTIMIZER, BOTH, kind=kind)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), layout.shapes)
    state = jax.device_put(init_optimizer(OPTIMIZER, params), to)
    usual = jax.devices()[0].default_memory().kind
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {memory or usual}
