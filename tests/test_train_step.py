"""The train step against plain loops over sequences, experts and optimizers, on many meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from demix_jax.config.schema import MeshConfig, ModelConfig, OptimConfig
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import (
    Params,
    TrainState,
    count,
    join,
    param_shapes,
)
from demix_jax.model.transformer import token_logprobs
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import make_mesh
from demix_jax.training.train_state import branch_state
from demix_jax.training.train_step import train_step

MODEL = ModelConfig(layers=2, width=8, heads=2, context=6, vocab_size=13)
DOMAINS = 8  # that metrics tell apart
# A large eps: at gradients of rounding size Adam's g / |g| would compare noise with noise.
ADAMW = make_optimizer(OptimConfig(learning_rate=0.01, eps=1e-3), steps=10)
OPTIMIZER = optax.chain(optax.trace(0.0), ADAMW)  # the trace is the last gradient itself
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
# Numbers are those of any other compilation; LLVM just spends less time on programs run once.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}


def noisy_params(experts: int) -> Params:
    """Experts that differ, on the host."""
    rng = np.random.default_rng(0)
    shapes = param_shapes(MODEL, experts)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, x.dtype), shapes)


def start(params: Params) -> TrainState:
    return TrainState(params, init_optimizer(OPTIMIZER, params))


def balanced(domains: int, size: int, seed: int = 0) -> Batch:
    """[D, B, ...] with masks of every kind: full, ragged, empty, and prefixes left out."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (domains, size, MODEL.context + 1), np.int32)
    ends = rng.integers(0, MODEL.context + 1, (domains, size, 1))
    mask = np.arange(MODEL.context) < ends
    mask[0, 0], mask[-1, -1] = True, False
    mask[:, 1, 0] = False
    domain = np.broadcast_to(np.arange(domains, dtype=np.int32)[:, None], (domains, size))
    return Batch(tokens, mask, domain)


def layout_of(experts: int, devices: int = 1, **axes: int | str | bool) -> Layout:
    config = MeshConfig(**axes)
    mesh = make_mesh(config, experts, jax.devices()[:devices])
    return make_layout(config, mesh, MODEL, experts)


def step(state: TrainState, batch: Batch, *, layout: Layout | None = None):
    """On one device, or on those of a layout."""
    layout = layout or layout_of(len(jax.tree.leaves(state.params.experts)[0]))
    return train_step(OPTIMIZER, DOMAINS, layout, state, batch)


step_fn = jax.jit(step, compiler_options=QUICK)


def compiled(layout: Layout, *, trunk_frozen: bool = False):
    """The step for a layout."""
    trainable = Params(None if trunk_frozen else True, True)
    state = TrainState(layout.params_sharding, layout.optimizer_sharding(OPTIMIZER, trainable))
    return jax.jit(
        functools.partial(step, layout=layout),
        in_shardings=(state, layout.batch_sharding),
        out_shardings=(state, None),
        compiler_options=QUICK,
    )


def gradients(state: TrainState) -> Params:
    return Params(*(half[0].trace for half in state.opt_state))


def pick(tree, index: int):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@functools.partial(jax.jit, compiler_options=QUICK)
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def row_nats(shared, expert, tokens, mask):
    tree = join(shared, expert)
    values = token_logprobs(MODEL, tree, tokens[None, :-1], tokens[None, 1:])[0]
    return -jnp.where(mask, values, 0).sum()


def by_loop(params: Params, batch: Batch) -> tuple[np.ndarray, Params]:
    """Nats [D, B] and the gradient of (sum of nats) / (sum of tokens), one sequence at a time."""
    experts = len(jax.tree.leaves(params.experts)[0])  # of the domains in order, or one of all
    nats = np.zeros(batch.tokens.shape[:2])
    grads = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for d, b in np.ndindex(nats.shape):
        e = int(batch.domain[d, b]) if experts > 1 else 0
        nats[d, b], (trunk, expert) = row_nats(
            params.shared, pick(params.experts, e), batch.tokens[d, b], batch.mask[d, b]
        )
        jax.tree.map(lambda total, g: np.add(total, g, out=total), grads.shared, trunk)
        jax.tree.map(lambda total, g, e=e: np.add(total[e], g, out=total[e]), grads.experts, expert)
    return nats, jax.tree.map(lambda total: total / batch.mask.sum(), grads)


@functools.partial(jax.jit, compiler_options=QUICK)
def part_update(grads, state, weights):
    updates, state = ADAMW.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state


def updates_by_loop(params: Params, batches: list[Batch]) -> Params:
    """The weights after AdamW on each batch, every part with an optimizer of its own."""
    experts = len(jax.tree.leaves(params.experts)[0])
    parts = [params.shared, *(pick(params.experts, e) for e in range(experts))]
    states = [ADAMW.init(part) for part in parts]
    for batch in batches:
        whole = Params(parts[0], jax.tree.map(lambda *leaves: np.stack(leaves), *parts[1:]))
        grads = jax.tree.map(np.float32, by_loop(whole, batch)[1])
        each = [grads.shared, *(pick(grads.experts, e) for e in range(experts))]
        pairs = map(part_update, each, states, parts)
        parts, states = map(list, zip(*pairs, strict=True))
    return Params(parts[0], jax.tree.map(lambda *leaves: np.stack(leaves), *parts[1:]))


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


CUTS = [(3, 1), (3, 2), (3, 4), (1, 1), (1, 4)]  # experts, grad_accum_steps


@pytest.mark.parametrize(("experts", "grad_accum_steps"), CUTS)
def test_gradient_is_of_all_losses_over_all_tokens(experts, grad_accum_steps):
    """However the batch is cut; masks are uneven, so a mean of means would differ."""
    params, batch = noisy_params(experts), balanced(3, 4)
    new, _ = step_fn(start(params), to_microbatches(batch, experts, grad_accum_steps))
    assert_close(gradients(new), by_loop(params, batch)[1])


@pytest.mark.parametrize(("experts", "grad_accum_steps"), CUTS)
def test_metrics_are_sums_per_domain(experts, grad_accum_steps):
    params, batch = noisy_params(experts), balanced(3, 4)
    _, metrics = step_fn(start(params), to_microbatches(batch, experts, grad_accum_steps))
    np.testing.assert_allclose(metrics.nats[:3], by_loop(params, batch)[0].sum(1), rtol=1e-5)
    np.testing.assert_array_equal(metrics.tokens[:3], batch.mask.sum((1, 2)))


@pytest.mark.parametrize("grad_accum_steps", [1, 4])
def test_metrics_follow_shuffled_domains(grad_accum_steps):
    """The `dense` variant: one row of sequences, each of any domain; some domains are absent."""
    params, batch = noisy_params(1), balanced(1, 12)
    batch = batch._replace(domain=np.array([[2, 0, 7, 0, 0, 2, 7, 0, 2, 0, 2, 0]], np.int32))
    _, metrics = step_fn(start(params), to_microbatches(batch, 1, grad_accum_steps))
    nats, _ = by_loop(params, batch)
    of = [batch.domain == d for d in range(DOMAINS)]
    np.testing.assert_allclose(metrics.nats, [nats[where].sum() for where in of], rtol=1e-5)
    np.testing.assert_array_equal(metrics.tokens, [batch.mask[where].sum() for where in of])


def test_gradient_norm_is_over_all_parts():
    params, batch = noisy_params(3), balanced(3, 4)
    _, metrics = step_fn(start(params), to_microbatches(batch, 3, 1))
    leaves = jax.tree.leaves(by_loop(params, batch)[1])
    expected = np.sqrt(sum((leaf**2).sum() for leaf in leaves))
    assert float(metrics.grad_norm) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("grad_accum_steps", [1, 2, 4])
def test_microbatches_of_dense_hold_equally_many_of_every_domain(grad_accum_steps):
    for domains in to_microbatches(balanced(3, 4), 1, grad_accum_steps).domain:
        assert sorted(domains.ravel().tolist()) == sorted([0, 1, 2] * (4 // grad_accum_steps))


@pytest.mark.parametrize("experts", [1, 3])
def test_lift_keeps_every_sequence_with_its_mask_and_domain(experts):
    batch = balanced(3, 4)

    def rows(batch):
        return sorted(zip(*(leaf.reshape(12, -1).tolist() for leaf in batch), strict=True))

    assert rows(to_microbatches(batch, experts, 2)) == rows(batch)


def test_lift_gives_every_expert_its_own_domain():
    domain = to_microbatches(balanced(3, 4), 3, 2).domain
    np.testing.assert_array_equal(domain, np.broadcast_to([[[0], [1], [2]]], (2, 3, 2)))


def test_one_domain_is_the_dense_model():
    """Whatever the variant is called: three updates equal those of a model with one FFN."""
    params, batches = noisy_params(1), [balanced(1, 12, seed) for seed in range(3)]
    state = start(params)
    for batch in batches:
        state, _ = step_fn(state, to_microbatches(batch, 1, 4))
    assert_close(state.params, updates_by_loop(params, batches))


def branch(state: TrainState, experts: int) -> TrainState:
    layout = layout_of(experts)
    return jax.tree.map(np.asarray, branch_state(state, layout, OPTIMIZER))


@functools.cache
def dense_state() -> TrainState:
    """A dense model after two updates, so that optimizer state is not zero."""
    state = start(noisy_params(1))
    for seed in range(2):
        state, _ = step_fn(state, to_microbatches(balanced(3, 4, seed), 1, 1))
    return jax.tree.map(np.asarray, state)


def test_branch_copies_weights_optimizer_state():
    dense, demix = dense_state(), branch(dense_state(), 3)
    counts = [leaf for leaf in jax.tree.leaves(dense.opt_state.experts) if leaf.dtype == np.int32]
    assert {int(leaf[0]) for leaf in counts} == {2}
    for half, copies in zip(dense, demix, strict=True):
        for leaf, copy in zip(*map(jax.tree.leaves, (half.experts, copies.experts)), strict=True):
            np.testing.assert_array_equal(copy, np.concatenate([leaf] * 3))


def test_branch_leaves_the_trunk_alone():
    for half, new in zip(dense_state(), branch(dense_state(), 3), strict=True):
        jax.tree.map(np.testing.assert_array_equal, new.shared, half.shared)


def test_branching_changes_no_loss():
    dense, batch = dense_state(), balanced(3, 4, seed=7)
    _, before = step_fn(dense, to_microbatches(batch, 1, 1))
    _, after = step_fn(branch(dense, 3), to_microbatches(batch, 3, 1))
    np.testing.assert_allclose(after.nats, before.nats, rtol=1e-6)


def test_first_update_after_branching_moves_the_trunk_like_dense():
    dense, batch = dense_state(), balanced(3, 4, seed=7)
    folded, _ = step_fn(dense, to_microbatches(batch, 1, 1))
    lifted, _ = step_fn(branch(dense, 3), to_microbatches(batch, 3, 1))
    assert_close(lifted.params.shared, folded.params.shared)


def test_experts_learn_from_their_own_domain_only():
    """Other text in domain 1, as many tokens: no other expert comes out different."""
    params, batch = noisy_params(3), balanced(3, 4)
    tokens = batch.tokens.copy()
    tokens[1] = (tokens[1] + 1 + np.arange(MODEL.context + 1)) % MODEL.vocab_size
    before, _ = step_fn(start(params), to_microbatches(batch, 3, 2))
    after, _ = step_fn(start(params), to_microbatches(batch._replace(tokens=tokens), 3, 2))
    leaves = zip(*(jax.tree.leaves(s.params.experts) for s in (before, after)), strict=True)
    for old, new in leaves:
        np.testing.assert_array_equal(new[::2], old[::2])
        assert (new[1] != old[1]).any()


def two_batches(experts: int) -> list[Batch]:
    """24 sequences of each domain divide over every mesh below."""
    return [balanced(experts if experts > 1 else 4, 24, seed) for seed in range(2)]


@functools.cache
def expected_updates(experts: int) -> Params:
    return updates_by_loop(noisy_params(experts), two_batches(experts))


@functools.cache
def on_mesh(experts: int, devices: int, axes: tuple[int, int], **options: int | str):
    """The layout, and the step compiled for it."""
    layout = layout_of(experts, devices, domain=axes[0], data=axes[1], **options)
    return layout, compiled(layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "devices", "axes", "shape"),
    [
        (8, 1, (0, 0), (1, 1)),
        pytest.param(8, 2, (0, 0), (2, 1), marks=pytest.mark.slow),
        pytest.param(8, 4, (0, 0), (4, 1), marks=pytest.mark.slow),
        pytest.param(8, 8, (0, 0), (8, 1), marks=pytest.mark.slow),
        (8, 8, (2, 4), (2, 4)),
        (5, 3, (0, 0), (1, 3)),
        pytest.param(3, 2, (0, 0), (1, 2), marks=pytest.mark.slow),
        (1, 8, (0, 0), (1, 8)),
    ],
    ids=str,
)
def test_two_updates_are_the_same_on_every_mesh(experts, devices, axes, shape):
    """Only the order of float32 sums may differ: 1e-6 on weights of size 0.3."""
    layout, fn = on_mesh(experts, devices, axes)
    assert layout.mesh.devices.shape == (*shape, 1)
    state = jax.tree.map(np.asarray, start(noisy_params(experts)))
    for batch in two_batches(experts):
        state, _ = fn(state, to_microbatches(batch, experts, 2))
    assert_close(state.params, expected_updates(experts))


# Experts that do not divide over groups, devices that share heads and hidden units, and copies that
# share out optimizer state or parameters.
CUT_LAYOUTS = [
    (5, 4, {"domain": 4}),
    (5, 4, {"domain": 2, "shard": "optimizer"}),
    (9, 8, {"domain": 8}),
    (3, 8, {"domain": 2, "shard": "params"}),
    (4, 2, {"domain": 1, "data": 1, "model": 2}),
    (4, 8, {"domain": 2, "data": 2, "model": 2}),
    (4, 8, {"domain": 2, "data": 2, "model": 2, "shard": "optimizer"}),
    (4, 8, {"domain": 2, "data": 2, "model": 2, "shard": "params"}),
    (8, 8, {"domain": 8, "shard": "optimizer"}),
    (8, 8, {"domain": 2, "shard": "params"}),
    (1, 8, {"shard": "optimizer"}),
    (1, 8, {"model": 2, "shard": "params"}),
    (4, 8, {"domain": 2, "shard": "optimizer", "offload_optimizer": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "devices", "options"), CUT_LAYOUTS, ids=str)
def test_two_updates_are_the_same_however_the_model_is_cut(experts, devices, options):
    layout = layout_of(experts, devices, **options)
    fn, empty = compiled(layout), layout.padded_experts - experts
    params = noisy_params(experts)

    def fill(leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([leaf, np.zeros((empty, *leaf.shape[1:]), leaf.dtype)])

    params = params._replace(experts=jax.tree.map(fill, params.experts))
    state = jax.tree.map(np.asarray, start(params))
    for batch in two_batches(experts):
        rows = Batch(*map(fill, batch)) if experts > 1 else batch
        state, metrics = fn(state, to_microbatches(rows, experts, 2))
    assert_close(
        jax.tree.map(lambda leaf: leaf[:experts], state.params.experts),
        expected_updates(experts).experts,
    )
    assert_close(state.params.shared, expected_updates(experts).shared)
    nats, _ = by_loop(noisy_params(experts), two_batches(experts)[1])
    tokens = two_batches(experts)[1].mask.sum((1, 2))[:DOMAINS]
    np.testing.assert_array_equal(metrics.tokens[: len(tokens)], tokens)
    assert not metrics.tokens[len(tokens) :].any()
    assert metrics.nats.sum() < nats.sum(), "the second step starts from better parameters"


@pytest.mark.parametrize("shard", ["optimizer", "params"])
def test_copies_hold_a_part_each(shard):
    """Of what divides: a leaf of the trunk over eight devices, one of an expert over four."""
    layout = layout_of(4, 8, domain=2, shard=shard)
    shapes = layout.shapes
    cut = layout.params if shard == "params" else layout.state
    kernel = cut.shared["layers"]["attention"]["out"]["kernel"]
    assert kernel == PartitionSpec(None, ("domain", "data"))
    assert cut.experts["layers"]["ffn"]["up"]["kernel"] == PartitionSpec(
        "domain", None, None, "data"
    )
    held = jax.tree.map(
        lambda s, leaf: s.shard_shape(leaf.shape), layout.shardings(layout.state), shapes
    )
    size = {
        half: sum(map(np.prod, jax.tree.leaves(shapes, is_leaf=lambda x: type(x) is tuple)))
        for half, shapes in held._asdict().items()
    }
    assert size["shared"] == count(shapes.shared) // 8
    assert size["experts"] == count(shapes.experts) // 8
    if shard == "optimizer":
        assert layout.params == layout_of(4, 8, domain=2).params


def sizes_sent(experts: int, devices: int, axes: tuple[int, int]) -> set[int]:
    """Every dimension of every array that devices exchange in one update."""
    _, fn = on_mesh(experts, devices, axes)
    state = jax.tree.map(np.asarray, start(noisy_params(experts)))
    text = fn.lower(state, to_microbatches(two_batches(experts)[0], experts, 2)).compile().as_text()
    results = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", text)
    return {
        int(n) for dims in re.findall(r"\[([\d,]+)\]", " ".join(results)) for n in dims.split(",")
    }


def test_an_expert_on_its_own_device_sends_no_gradient():
    """Nothing as wide as the FFN is exchanged; attention's gradients (3 x width) are."""
    sent = sizes_sent(8, 8, (0, 0))
    assert 3 in sent
    assert 4 * MODEL.width not in sent


def test_an_expert_on_four_devices_reduces_its_gradient():
    """Guards the test above: where the gradient of an FFN must be sent, it is found."""
    assert 4 * MODEL.width in sizes_sent(8, 8, (2, 4))


# Under a frozen trunk (DEMix-DAPT).


def frozen(params: Params) -> TrainState:
    return TrainState(params, init_optimizer(OPTIMIZER, params._replace(shared=None)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "grad_accum_steps"),
    [
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(1, 4, marks=pytest.mark.slow),
        (3, 2),
    ],
)
def test_a_step_under_a_frozen_trunk_is_that_of_each_expert_alone(experts, grad_accum_steps):
    """Gradient of an expert's own mean loss, taken with respect to that expert only."""
    params, batch = noisy_params(experts), balanced(experts, 4)
    new, _ = step_fn(frozen(params), to_microbatches(batch, experts, grad_accum_steps))
    for e in range(experts):
        tokens, mask, one = batch.tokens[e], batch.mask[e], pick(params.experts, e)

        def loss(expert, tokens=tokens, mask=mask):
            tree = join(params.shared, expert)
            scores = token_logprobs(MODEL, tree, tokens[:, :-1], tokens[:, 1:])
            return -(scores * mask).sum() / mask.sum()

        grads = jax.grad(loss)(one)
        updates, _ = ADAMW.update(grads, ADAMW.init(one), one)
        assert_close(pick(new.params.experts, e), optax.apply_updates(one, updates))
        assert_close(pick(new.opt_state.experts[0].trace, e), grads)


def test_a_frozen_trunk_comes_back_bit_for_bit_without_optimizer_state():
    state = frozen(noisy_params(3))
    new, _ = step_fn(state, to_microbatches(balanced(3, 4), 3, 1))
    jax.tree.map(np.testing.assert_array_equal, new.params.shared, state.params.shared)
    assert new.opt_state.shared is None


def test_experts_under_a_frozen_trunk_do_not_depend_on_each_other():
    """Other text and fewer tokens in domain 1: no other expert comes out different."""
    params, batch = noisy_params(3), balanced(3, 4)
    mask = batch.mask.copy()
    mask[1, 1:] = False
    before, _ = step_fn(frozen(params), to_microbatches(batch, 3, 2))
    after, _ = step_fn(frozen(params), to_microbatches(batch._replace(mask=mask), 3, 2))
    leaves = zip(*(jax.tree.leaves(s.params.experts) for s in (before, after)), strict=True)
    for old, new in leaves:
        np.testing.assert_array_equal(new[::2], old[::2])
        assert (new[1] != old[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "axes"), [(4, (4, 2)), (4, (2, 2)), (1, (1, 4))], ids=str)
def test_a_frozen_trunk_is_the_same_on_every_mesh(experts, axes):
    params, batch = noisy_params(experts), to_microbatches(balanced(experts, 8), experts, 2)
    alone, before = step_fn(frozen(params), batch)
    layout = layout_of(experts, axes[0] * axes[1], domain=axes[0], data=axes[1])
    new, metrics = compiled(layout, trunk_frozen=True)(
        jax.tree.map(np.asarray, frozen(params)), batch
    )
    assert_close(new.params, alone.params)
    assert_close(metrics, before)


def of_accumulators(state: TrainState, batch: Batch) -> list[tuple[int, ...]]:
    """Shapes of what the loop over microbatches carries: the gradients it adds up."""
    program = jax.make_jaxpr(step)(state, batch)
    (local,) = [eqn for eqn in program.eqns if eqn.primitive.name == "shard_map"]
    (scan,) = [eqn for eqn in local.params["jaxpr"].eqns if eqn.primitive.name == "scan"]
    consts, carried = scan.params["num_consts"], scan.params["num_carry"]
    return sorted(var.aval.shape for var in scan.invars[consts : consts + carried])


def test_no_gradient_of_a_frozen_trunk_is_computed():
    params, batch = noisy_params(3), to_microbatches(balanced(3, 4), 3, 2)
    experts = sorted(leaf.shape for leaf in jax.tree.leaves(params.experts))
    trunk = [leaf.shape for leaf in jax.tree.leaves(params.shared)]
    assert of_accumulators(frozen(params), batch) == experts
    assert of_accumulators(start(params), batch) == sorted(experts + trunk)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_adapting_needs_memory_for_trunk_experts_and_their_optimizer_state(grad_accum_steps):
    """What lives between steps; the trunk's own gradient and optimizer state would double it."""
    model = ModelConfig(layers=2, width=64, heads=2, context=8, vocab_size=512)
    optimizer, count = make_optimizer(OptimConfig(), steps=10), 2
    params = param_shapes(model, count)
    opt_state = jax.eval_shape(lambda p: init_optimizer(optimizer, p), params._replace(shared=None))
    batch = to_microbatches(balanced(count, 4), count, grad_accum_steps)
    mesh = make_mesh(MeshConfig(), count, jax.devices()[:1])
    layout = make_layout(MeshConfig(), mesh, model, count)
    fn = jax.jit(functools.partial(train_step, optimizer, count, layout), donate_argnums=0)
    found = fn.lower(TrainState(params, opt_state), batch).compile().memory_analysis()
    live = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes

    def size(tree) -> int:
        return sum(4 * leaf.size for leaf in jax.tree.leaves(tree))

    expected = size(params.shared) + 3 * size(params.experts)
    assert expected < live < 1.02 * expected
    assert size(params.shared) > 0.1 * expected, "too small a trunk for this test to see it"
