"""The train step against plain loops over sequences, experts and optimizers, on many meshes."""

import dataclasses
import functools
import re

import decoder64
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from demix_jax.config.schema import MeshConfig, ModelConfig, OptimConfig
from demix_jax.data.batch import Batch, to_microbatches
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params, TrainState, count, join, param_shapes, stack
from demix_jax.model.transformer import token_logprobs
from demix_jax.parallel.layout import Layout, make_layout
from demix_jax.parallel.mesh import make_mesh
from demix_jax.training.train_state import branch_state
from demix_jax.training.train_step import Metrics, train_step

MODEL = ModelConfig(layers=2, width=8, heads=2, context=6, vocab_size=13)
DOMAINS = 8  # that metrics tell apart
# A large eps: at gradients of rounding size Adam's g / |g| would compare noise with noise.
ADAMW = make_optimizer(OptimConfig(learning_rate=0.01, eps=1e-3), steps=10)
OPTIMIZER = optax.chain(optax.trace(0.0), ADAMW)  # the trace is the last gradient itself
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def noisy_params(experts: int, model: ModelConfig = MODEL) -> Params:
    """Experts that differ, on the host."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: 0.3 * rng.standard_normal(x.shape, x.dtype), param_shapes(model, experts)
    )


def start(params: Params, *, frozen: bool = False) -> TrainState:
    """Fresh state on the host; with `frozen`, shared parameters are not trained (DEMix-DAPT)."""
    trainable = params._replace(shared=None) if frozen else params
    return jax.tree.map(np.asarray, TrainState(params, init_optimizer(OPTIMIZER, trainable)))


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


def layout_of(
    experts: int, devices: int = 1, *, shapes: ModelConfig = MODEL, **options: int | str | bool
) -> Layout:
    config = MeshConfig(**options)
    mesh = make_mesh(config, experts, jax.devices()[:devices])
    return make_layout(config, mesh, shapes, experts)


@functools.cache
def shardings_of(layout: Layout, *, frozen: bool = False) -> tuple:
    """Of the state, and of a batch."""
    trainable = Params(None if frozen else True, True)
    state = TrainState(layout.params_sharding, layout.optimizer_sharding(OPTIMIZER, trainable))
    return state, layout.batch_sharding


def jitted(layout: Layout, *, frozen: bool = False):
    """The step of state and batch, jitted for a layout."""
    shardings = shardings_of(layout, frozen=frozen)
    return jax.jit(
        functools.partial(train_step, OPTIMIZER, DOMAINS, layout),
        in_shardings=shardings,
        out_shardings=(shardings[0], None),
    )


def compiled(layout: Layout, *, frozen: bool = False):
    """The same, which lays out what it is given: first steps and later ones are traced once."""
    step, shardings = jitted(layout, frozen=frozen), shardings_of(layout, frozen=frozen)
    return lambda *given: step(*jax.device_put(given, shardings))


@functools.cache
def step_for(experts: int, *, frozen: bool = False):
    """The step on one device; all tests of as many experts share it."""
    return compiled(layout_of(experts), frozen=frozen)


def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    experts = len(jax.tree.leaves(state.params.experts)[0])
    return step_for(experts, frozen=state.opt_state.shared is None)(state, batch)


def gradients(state: TrainState) -> Params:
    return Params(*(half and half[0].trace for half in state.opt_state))


def pick(tree, index: int):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=(1, 2))
def row_nats(model, shared, expert, tokens, mask):
    tree = join(shared, expert)
    values = token_logprobs(model, tree, tokens[None, :-1], tokens[None, 1:])[0]
    return -jnp.where(mask, values, 0).sum()


def add_to(totals, grads, tokens: int) -> None:
    jax.tree.map(lambda total, grad: np.add(total, grad / tokens, out=total), totals, grads)


def by_loop(
    params: Params, batch: Batch, *, model: ModelConfig = MODEL, alone: bool = False
) -> tuple[np.ndarray, Params]:
    """Nats [D, B] and the gradient of (sum of nats) / (sum of tokens), one sequence at a time.

    With `alone`, an expert's gradient is of the nats and tokens of its own sequences.
    """
    experts = len(jax.tree.leaves(params.experts)[0])  # of the domains in order, or one of all
    nats = np.zeros(batch.tokens.shape[:2])
    grads = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for d, b in np.ndindex(nats.shape):
        e = int(batch.domain[d, b]) if experts > 1 else 0
        own = batch.mask[batch.domain == e].sum() if alone and experts > 1 else batch.mask.sum()
        nats[d, b], (shared, expert) = row_nats(
            model, params.shared, pick(params.experts, e), batch.tokens[d, b], batch.mask[d, b]
        )
        add_to(grads.shared, shared, own)
        add_to(pick(grads.experts, e), expert, own)
    return nats, grads


@jax.jit
def part_update(grads, state, weights):
    updates, state = ADAMW.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state


def updates_by_loop(
    params: Params, batches: list[Batch], *, model: ModelConfig = MODEL, frozen: bool = False
) -> Params:
    """The weights after AdamW on each batch, every part with an optimizer of its own."""
    experts = len(jax.tree.leaves(params.experts)[0])
    parts = [params.shared, *(pick(params.experts, e) for e in range(experts))]
    states = [ADAMW.init(part) for part in parts]
    for batch in batches:
        whole = Params(parts[0], stack(parts[1:]))
        alone = frozen or not count(params.shared)
        grads = jax.tree.map(np.float32, by_loop(whole, batch, model=model, alone=alone)[1])
        each = [grads.shared, *(pick(grads.experts, e) for e in range(experts))]
        pairs = list(map(part_update, each, states, parts))
        if frozen:
            pairs[0] = parts[0], states[0]
        parts, states = map(list, zip(*pairs, strict=True))
    return Params(parts[0], stack(parts[1:]))


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


CASES = [(3, 1), (3, 2), (3, 4), (1, 1), (1, 4)]  # experts, grad_accum_steps


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "grad_accum_steps"), CASES)
def test_gradient_is_of_all_losses_over_all_tokens_and_metrics_are_sums(experts, grad_accum_steps):
    """However the batch is divided; masks are uneven, so a mean of means would differ."""
    params, batch = noisy_params(experts), balanced(3, 4)
    new, metrics = step_fn(start(params), to_microbatches(batch, experts, grad_accum_steps))
    nats, grads = by_loop(params, batch)
    assert_close(gradients(new), grads)
    np.testing.assert_allclose(metrics.nats[:3], nats.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(metrics.tokens[:3], batch.mask.sum((1, 2)))
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5), "over all parts"


@pytest.mark.slow
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


def test_microbatches_of_dense_hold_equally_many_of_every_domain():
    for grad_accum_steps in (1, 2, 4):
        for domains in to_microbatches(balanced(3, 4), 1, grad_accum_steps).domain:
            assert sorted(domains.ravel().tolist()) == sorted([0, 1, 2] * (4 // grad_accum_steps))


@pytest.mark.parametrize("experts", [1, 3])
def test_microbatches_keep_every_sequence_with_its_mask_and_domain(experts):
    batch = balanced(3, 4)

    def rows(batch):
        return sorted(zip(*(leaf.reshape(12, -1).tolist() for leaf in batch), strict=True))

    assert rows(to_microbatches(batch, experts, 2)) == rows(batch)


def test_microbatches_give_every_expert_its_own_domain():
    domain = to_microbatches(balanced(3, 4), 3, 2).domain
    np.testing.assert_array_equal(domain, np.broadcast_to([[[0], [1], [2]]], (2, 3, 2)))


def test_one_domain_is_the_dense_model():
    """Three updates equal those of a model with one FFN, by any name of the variant."""
    params, batches = noisy_params(1), [balanced(1, 12, seed) for seed in range(3)]
    state = start(params)
    for batch in batches:
        state, _ = step_fn(state, to_microbatches(batch, 1, 4))
    assert_close(state.params, updates_by_loop(params, batches))


@functools.cache
def dense_state() -> TrainState:
    """A dense model after two updates, so that optimizer state and counts are not zero."""
    state = start(noisy_params(1))
    for seed in range(2):
        state, _ = step_fn(state, to_microbatches(balanced(3, 4, seed), 1, 1))
    return jax.tree.map(np.asarray, state)


def branch(state: TrainState, experts: int) -> TrainState:
    return jax.tree.map(np.asarray, branch_state(state, layout_of(experts), OPTIMIZER))


def test_branching_copies_weights_optimizer_state_and_counts():
    dense, demix = dense_state(), branch(dense_state(), 3)
    counts = [leaf for leaf in jax.tree.leaves(dense.opt_state.experts) if leaf.dtype == np.int32]
    assert {int(leaf[0]) for leaf in counts} == {2}
    for half, copies in zip(dense, demix, strict=True):
        for leaf, copy in zip(*map(jax.tree.leaves, (half.experts, copies.experts)), strict=True):
            np.testing.assert_array_equal(copy, np.concatenate([leaf] * 3))


def test_branching_changes_no_loss_and_the_first_update_moves_the_trunk_like_dense():
    dense, batch = dense_state(), balanced(3, 4, seed=7)
    folded, before = step_fn(dense, to_microbatches(batch, 1, 1))
    lifted, after = step_fn(branch(dense, 3), to_microbatches(batch, 3, 1))
    np.testing.assert_allclose(after.nats, before.nats, rtol=1e-6)
    assert_close(lifted.params.shared, folded.params.shared)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_experts_learn_from_their_own_domain_only(frozen):
    """Other text in domain 1, as many tokens; under a frozen trunk fewer tokens too.

    No other expert comes out different.
    """
    params, batch = noisy_params(3), balanced(3, 4)
    tokens, mask = batch.tokens.copy(), batch.mask.copy()
    tokens[1] = (tokens[1] + 1 + np.arange(MODEL.context + 1)) % MODEL.vocab_size
    if frozen:
        mask[1, 1:] = False
    other = batch._replace(tokens=tokens, mask=mask)
    before, after = (
        step_fn(start(params, frozen=frozen), to_microbatches(b, 3, 2)) for b in (batch, other)
    )
    leaves = zip(*(jax.tree.leaves(s.params.experts) for s, _ in (before, after)), strict=True)
    for old, new in leaves:
        np.testing.assert_array_equal(new[::2], old[::2])
        assert (new[1] != old[1]).any()


def two_batches(experts: int) -> list[Batch]:
    """24 sequences of each domain divide over every mesh below."""
    return [balanced(experts if experts > 1 else 4, 24, seed) for seed in range(2)]


@functools.cache
def expected_updates(experts: int) -> Params:
    return updates_by_loop(noisy_params(experts), two_batches(experts))


# Experts, devices, mesh settings, and the mesh: derived and explicit axes, experts that do not
# divide over groups, tensor parallelism, and sharded copies.
LAYOUTS = [
    (8, 1, {}, (1, 1, 1)),
    (8, 8, {}, (8, 1, 1)),
    (8, 8, {"domain": 2, "data": 4}, (2, 4, 1)),
    (5, 3, {}, (1, 3, 1)),
    (1, 8, {}, (1, 8, 1)),
    (9, 8, {"domain": 8}, (8, 1, 1)),
    (5, 4, {"domain": 2, "shard": "optimizer"}, (2, 2, 1)),
    (3, 8, {"domain": 2, "shard": "params"}, (2, 4, 1)),
    (4, 8, {"domain": 2, "data": 2, "model": 2}, (2, 2, 2)),
    (4, 8, {"domain": 2, "data": 2, "model": 2, "shard": "optimizer"}, (2, 2, 2)),
    (4, 8, {"domain": 2, "data": 2, "model": 2, "shard": "params"}, (2, 2, 2)),
    (8, 8, {"domain": 8, "shard": "optimizer"}, (8, 1, 1)),
    (1, 8, {"model": 2, "shard": "params"}, (1, 4, 2)),
    (4, 8, {"domain": 2, "shard": "optimizer", "offload_optimizer": True}, (2, 4, 1)),
]


# Of other shapes: grouped heads on devices of their own, gates and a second table; norms over heads
# that devices share, and behind blocks.
SHAPED = [
    ("llama", 4, {"domain": 2, "data": 2, "model": 2, "shard": "params"}),
    ("olmo", 1, {"data": 4, "model": 2}),
]


@functools.cache
def on_mesh(case: int):
    """A layout of `LAYOUTS`, and the step for it."""
    experts, devices, options, _ = LAYOUTS[case]
    layout = layout_of(experts, devices, **options)
    return layout, compiled(layout)


def pad(layout: Layout, tree):
    """Adds the empty experts or rows of a layout."""

    def fill(leaf: np.ndarray) -> np.ndarray:
        empty = layout.padded_experts - layout.experts
        return np.concatenate([leaf, np.zeros((empty, *leaf.shape[1:]), leaf.dtype)])

    return jax.tree.map(fill, tree) if layout.experts > 1 else tree


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(LAYOUTS)), ids=lambda case: str(LAYOUTS[case]))
def test_two_updates_are_the_same_on_every_layout(case):
    """Only the order of float32 sums may differ: 1e-6 on weights of size 0.3."""
    layout, fn = on_mesh(case)
    experts, *_, shape = LAYOUTS[case]
    assert layout.mesh.devices.shape == shape
    params = noisy_params(experts)
    state = start(params._replace(experts=pad(layout, params.experts)))
    for batch in two_batches(experts):
        state, metrics = fn(state, to_microbatches(pad(layout, batch), experts, 2))
    held = jax.tree.map(lambda leaf: leaf[:experts], state.params.experts)
    assert_close(Params(state.params.shared, held), expected_updates(experts))
    nats, _ = by_loop(params, two_batches(experts)[1])
    tokens = two_batches(experts)[1].mask.sum((1, 2))[:DOMAINS]
    np.testing.assert_array_equal(metrics.tokens[: len(tokens)], tokens)
    assert not metrics.tokens[len(tokens) :].any()
    assert metrics.nats.sum() < nats.sum(), "the second step starts from better parameters"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "experts", "options"), SHAPED, ids=str)
def test_an_update_of_another_shape_is_the_same_on_a_mesh(name, experts, options):
    model = dataclasses.replace(MODEL, **decoder64.SHAPES[name])
    layout = layout_of(experts, 8, shapes=model, **options)
    params, batch = noisy_params(experts, model), balanced(4, 8)
    new, _ = compiled(layout)(start(params), to_microbatches(batch, experts, 2))
    assert_close(new.params, updates_by_loop(params, [batch], model=model))


@pytest.mark.parametrize("shard", ["optimizer", "params"])
def test_copies_hold_a_part_each(shard):
    """Leaves that divide: a shared one over eight devices, one of an expert over four."""
    layout = layout_of(4, 8, domain=2, shard=shard)
    specs = layout.params if shard == "params" else layout.state
    kernel = specs.shared["layers"]["attention"]["out"]["kernel"]
    assert kernel == PartitionSpec(None, ("domain", "data"))
    kernel = specs.experts["layers"]["ffn"]["up"]["kernel"]
    assert kernel == PartitionSpec("domain", None, None, "data")
    held = jax.tree.map(
        lambda s, leaf: s.shard_shape(leaf.shape), layout.shardings(layout.state), layout.shapes
    )
    for half, shapes in zip(layout.shapes, held, strict=True):
        sizes = map(np.prod, jax.tree.leaves(shapes, is_leaf=lambda x: type(x) is tuple))
        assert sum(sizes) == count(half) // 8
    if shard == "optimizer":
        assert layout.params == layout_of(4, 8, domain=2).params


def sizes_sent(case: int) -> set[int]:
    """Every dimension of every array that devices exchange in one update."""
    experts, (layout, _) = LAYOUTS[case][0], on_mesh(case)
    batch = to_microbatches(two_batches(experts)[0], experts, 2)
    text = jitted(layout).lower(start(noisy_params(experts)), batch).compile().as_text()
    results = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", text)
    return {
        int(n) for dims in re.findall(r"\[([\d,]+)\]", " ".join(results)) for n in dims.split(",")
    }


@pytest.mark.slow
def test_an_expert_on_its_own_device_sends_no_gradient():
    """Nothing as wide as the FFN is exchanged; attention's gradients (3 x width) are.

    On four devices, an expert's gradient is reduced and found, which guards the first assertion.
    """
    sent = sizes_sent(1)
    assert 3 in sent
    assert MODEL.ffn_width not in sent
    assert MODEL.ffn_width in sizes_sent(2)


# Under a frozen trunk (DEMix-DAPT).


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "grad_accum_steps"), [(1, 1), (1, 4), (3, 2)])
def test_a_step_under_a_frozen_trunk_is_that_of_each_expert_alone(experts, grad_accum_steps):
    """Gradient of an expert's own mean loss, taken with respect to that expert only."""
    params, batch = noisy_params(experts), balanced(experts, 4)
    state = start(params, frozen=True)
    new, _ = step_fn(state, to_microbatches(batch, experts, grad_accum_steps))
    for e in range(experts):
        tokens, mask, one = batch.tokens[e], batch.mask[e], pick(params.experts, e)

        def loss(expert, tokens=tokens, mask=mask):
            tree = join(params.shared, expert)
            scores = token_logprobs(MODEL, tree, tokens[:, :-1], tokens[:, 1:])
            return -(scores * mask).sum() / mask.sum()

        grads = jax.jit(jax.grad(loss))(one)
        updates, _ = ADAMW.update(grads, ADAMW.init(one), one)
        assert_close(pick(new.params.experts, e), optax.apply_updates(one, updates))
        assert_close(pick(gradients(new).experts, e), grads)


def test_a_frozen_trunk_comes_back_bit_for_bit_without_optimizer_state():
    state = start(noisy_params(3), frozen=True)
    new, _ = step_fn(state, to_microbatches(balanced(3, 4), 3, 2))
    jax.tree.map(np.testing.assert_array_equal, new.params.shared, state.params.shared)
    assert new.opt_state.shared is None


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "axes"), [(4, (4, 2)), (4, (2, 2)), (1, (1, 4))], ids=str)
def test_a_frozen_trunk_is_the_same_on_every_mesh(experts, axes):
    params, batch = noisy_params(experts), to_microbatches(balanced(experts, 8), experts, 2)
    alone, before = step_fn(start(params, frozen=True), batch)
    layout = layout_of(experts, axes[0] * axes[1], domain=axes[0], data=axes[1])
    new, metrics = compiled(layout, frozen=True)(start(params, frozen=True), batch)
    assert_close(new.params, alone.params)
    assert_close(metrics, before)


def shapes_of_accumulators(state: TrainState, batch: Batch) -> list[tuple[int, ...]]:
    """Shapes that the loop over microbatches carries: the gradients it adds up."""
    step = functools.partial(train_step, OPTIMIZER, DOMAINS, layout_of(3))
    program = jax.make_jaxpr(step)(state, batch)
    (local,) = [eqn for eqn in program.eqns if eqn.primitive.name == "shard_map"]
    (scan,) = [eqn for eqn in local.params["jaxpr"].eqns if eqn.primitive.name == "scan"]
    made = [aval.shape for aval in scan.params["jaxpr"].out_avals]  # stacked if not carried
    outs = [var.aval.shape for var in scan.outvars]
    return sorted(shape for shape, one in zip(outs, made, strict=True) if shape == one)


def test_no_gradient_of_a_frozen_trunk_is_computed():
    params, batch = noisy_params(3), to_microbatches(balanced(3, 4), 3, 2)
    shared, experts = ([leaf.shape for leaf in jax.tree.leaves(half)] for half in params)
    assert shapes_of_accumulators(start(params, frozen=True), batch) == sorted(experts)
    assert shapes_of_accumulators(start(params), batch) == sorted(experts + shared)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_adapting_needs_memory_for_trunk_experts_and_their_optimizer_state(grad_accum_steps):
    """Arrays that live between steps; the trunk's own gradient and state would double it."""
    model = ModelConfig(layers=2, width=64, heads=2, context=8, vocab_size=512)
    optimizer, experts = make_optimizer(OptimConfig(), steps=10), 2
    layout = layout_of(experts, shapes=model)
    params = layout.shapes
    opt_state = jax.eval_shape(lambda p: init_optimizer(optimizer, p), Params(None, params.experts))
    batch = to_microbatches(balanced(experts, 4), experts, grad_accum_steps)
    fn = jax.jit(functools.partial(train_step, optimizer, experts, layout), donate_argnums=0)
    memory = fn.lower(TrainState(params, opt_state), batch).compile().memory_analysis()
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    shared, owned = (4 * count(half) for half in params)
    expected = shared + 3 * owned
    assert expected < live < 1.02 * expected
    assert shared > 0.1 * expected, "too small a trunk for this test to see it"
