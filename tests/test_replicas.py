"""Where rows find their experts: plans, and the exchange that they describe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from demix_jax.config.schema import MeshConfig
from demix_jax.parallel.mesh import make_mesh
from demix_jax.training.replicas import lend, of_rows, plan_rows

P = PartitionSpec


def random_slots(seed: int) -> tuple[tuple[int, ...], int, int]:
    """Rows in any order, every expert in at least one; experts, groups."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 6))
    experts, rows = groups * int(rng.integers(1, 4)), groups * int(rng.integers(3, 7))
    slots = np.append(np.arange(experts), rng.integers(0, experts, rows - experts))
    return tuple(rng.permutation(slots).tolist()), experts, groups


@pytest.mark.parametrize("seed", range(40))
def test_every_row_finds_its_expert(seed):
    """Played through with numbers in the place of experts."""
    slots, experts, groups = random_slots(seed)
    plan = plan_rows(slots, experts, groups)
    own = np.arange(experts).reshape(groups, -1)
    held = [part.tolist() for part in own]
    for pairs, sent in plan.rounds:
        got = {to: int(own[sender][sent[sender]]) for sender, to in pairs}
        for g in range(groups):
            held[g].append(got.get(g, -1))
    found = [held[g][place] for g in range(groups) for place in plan.places[g]]
    assert tuple(found) == slots == sum(plan.slots, ())


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_sent_twice_or_for_nothing(seed):
    slots, experts, groups = random_slots(seed)
    plan = plan_rows(slots, experts, groups)
    own = experts // groups
    for pairs, _ in plan.rounds:
        senders, receivers = zip(*pairs, strict=True)
        assert len(set(senders)) == len(set(receivers)) == len(pairs)
    sent = sorted(
        (to, sender * own + of[sender]) for pairs, of in plan.rounds for sender, to in pairs
    )
    rows = np.array(slots).reshape(groups, -1)
    needed = {(g, int(e)) for g in range(groups) for e in rows[g] if e // own != g}
    assert sent == sorted(needed)


def test_rows_beside_their_experts_need_no_round():
    assert plan_rows((0, 0, 1, 2, 3, 3), 4, 2).rounds == ()
    assert plan_rows((3, 1, 0, 2, 2), 4, 1).rounds == ()
    assert plan_rows(range(8), 8, 4).rounds == ()


def test_the_expert_of_each_row_and_its_gradient_summed():
    """On four groups; the gradient of an expert is the sum over its rows, wherever they lie."""
    slots = (0, 0, 0, 5, 0, 1, 2, 7, 3, 4, 5, 6)
    mesh = make_mesh(MeshConfig(4, 1), 8, jax.devices()[:4])
    plan = plan_rows(slots, 8, 4)
    rng = np.random.default_rng(0)
    experts = rng.standard_normal((8, 3)).astype(np.float32)
    weights = rng.standard_normal((12, 3)).astype(np.float32)

    def local(experts, weights):
        rows, back = jax.vjp(lambda tree: of_rows(plan, lend(plan, tree)), {"up": experts})
        return rows["up"], back({"up": weights})[0]["up"]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("domain"), out_specs=P("domain"))
    rows, sums = jax.jit(mapped)(jnp.asarray(experts), jnp.asarray(weights))
    np.testing.assert_array_equal(rows, experts[list(slots)])
    expected = [weights[np.array(slots) == e].sum(0) for e in range(8)]
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
