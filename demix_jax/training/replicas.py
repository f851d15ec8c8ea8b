"""Domains with several rows in a batch: how each row comes to its expert's parameters.

The groups of devices along `domain` hold equally many experts and equally many rows of the batch,
so the row of a replica may lie in another group than its expert. Four experts in two groups, six
rows:

    group   experts   rows, by expert   receives
      0      0  1        0  0  0           -
      1      2  3        1  2  3         1 from 0

Before the microbatches a group sends each of its experts to every other group that has a row of it,
and after them the gradients come back the same way: nothing else crosses groups, and nothing at all
does where every row lies in the group of its expert. Who sends what is known before the program
runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demix_jax.model.params import Tree


class Round(NamedTuple):
    """One exchange, in which a group sends at most one expert and receives at most one.

    Attributes:
      pairs: (from, to) of groups.
      sent: [groups] which of its own experts each group sends; 0 where it sends none.
    """

    pairs: tuple[tuple[int, int], ...]
    sent: tuple[int, ...]


class Rows(NamedTuple):
    """Where rows find their experts.

    Attributes:
      slots: [groups, S / groups] the expert of each row, 0 to D - 1.
      rounds: what is sent.
      places: [groups, S / groups] where the group has that expert: among its own D / groups, then
        those received, one a round.
    """

    slots: tuple[tuple[int, ...], ...]
    rounds: tuple[Round, ...]
    places: tuple[tuple[int, ...], ...]


def plan_rows(slots: Sequence[int], experts: int, groups: int) -> Rows:
    """What has to be sent where.

    Args:
      slots: the expert of each row, [S].
      experts: D.
      groups: that share rows and experts out, in order; divides both.
    """
    own, rows = experts // groups, len(slots) // groups
    cut = tuple(tuple(slots[g * rows : (g + 1) * rows]) for g in range(groups))
    places = {(g, g * own + i): i for g in range(groups) for i in range(own)}
    rounds: list[dict[int, tuple[int, int]]] = []  # of each: sender -> receiver, expert
    for to, of in enumerate(cut):
        for expert in sorted({e for e in of if e // own != to}):
            sender = expert // own
            number = 0
            while number < len(rounds) and not _free(rounds[number], sender, to):
                number += 1
            rounds += [{}] if number == len(rounds) else []
            rounds[number][sender] = (to, expert)
            places[to, expert] = own + number
    exchanges = tuple(
        Round(
            tuple((sender, to) for sender, (to, _) in sorted(sent.items())),
            tuple(sent[g][1] % own if g in sent else 0 for g in range(groups)),
        )
        for sent in rounds
    )
    return Rows(cut, exchanges, tuple(tuple(places[g, e] for e in of) for g, of in enumerate(cut)))


def _free(sent: dict[int, tuple[int, int]], sender: int, to: int) -> bool:
    return sender not in sent and all(to != receiver for receiver, _ in sent.values())


def lend(rows: Rows, experts: Tree) -> Tree:
    """The group's own experts [D / groups, ...], followed by those that it receives.

    Runs in a program of one group, along a mesh axis `domain`. It is linear, and its transpose
    brings gradients back and adds them to those of the group that owns the expert.
    """
    if not rows.rounds:
        return experts
    held = [experts]
    for pairs, sent in rows.rounds:
        one = _take(experts, here(np.array(sent)[:, None]))
        held.append(jax.tree.map(lambda leaf, to=pairs: jax.lax.ppermute(leaf, "domain", to), one))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *held)


def of_rows(rows: Rows, lent: Tree) -> Tree:
    """The expert of each row, leaves [S / groups, ...], out of what `lend` returns."""
    held = {leaf.shape[0] for leaf in jax.tree.leaves(lent)}
    if all({len(of)} == held and of == tuple(range(len(of))) for of in rows.places):
        return lent
    return _take(lent, here(np.array(rows.places)))


def here(table: np.ndarray) -> jax.Array:
    """The row of a table [groups, ...] that is of this group."""
    return jnp.asarray(table)[jax.lax.axis_index("domain") if len(table) > 1 else 0]


def _take(tree: Tree, indices: jax.Array) -> Tree:
    return jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, mode="clip"), tree)
