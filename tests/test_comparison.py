"""Before and after: headlines, their changes, and what has stayed the same, by hand."""

import math
from typing import Any

from demix_jax.report.comparison import compare, comparisons, headline_name, headline_row
from demix_jax.report.results import Row, newest_rows

TOKENS = {"law": 1000, "med": 500, "acl": 250}


def make_row(mode: str, domain: str, nats: float, **more: Any) -> Row:
    """A row of a text of `TOKENS`; `nats` is per token."""
    row = {
        "run": "runs/demix",
        "variant": "demix",
        "checkpoint": 7,
        "params_hash": "a" * 16,
        "origin": None,
        "domain": domain,
        "split": "test",
        "mode": mode,
        "switch_rate": None,
        "switch_rate_from": None,
        "top_k": None,
        "expert": None,
        "tokens": TOKENS[domain],
        "bytes": 4 * TOKENS[domain],
        "nats": nats * TOKENS[domain],
        "posterior": None,
    }
    return row | more


def alone(expert: str, domain: str, nats: float, **more: Any) -> Row:
    return make_row("known" if expert == domain else "expert", domain, nats, expert=expert, **more)


def cached(domain: str, nats: float, *, dev: bool = True, **more: Any) -> Row:
    more |= {"switch_rate": 0.0, "switch_rate_from": "dev" if dev else "given"}
    return make_row("cached", domain, nats, **more)


def before() -> list[Row]:
    """Experts law and med on all three domains; acl is novel."""
    pairs = [("law", "law", 3.0), ("med", "law", 4.0), ("law", "med", 3.5), ("med", "med", 2.0)]
    pairs += [("law", "acl", 5.0), ("med", "acl", 6.0)]
    return [alone(*pair) for pair in pairs] + [cached("acl", 4.5), cached("law", 2.9)]


def after() -> list[Row]:
    """With an expert acl: the six scores stay, all but one to the last bit."""
    rows = [row for row in before() if row["mode"] != "cached"]
    rows[1]["nats"] = math.nextafter(rows[1]["nats"], 0)
    rows += [alone("acl", domain, nats) for domain, nats in (("law", 6.0), ("acl", 4.0))]
    return [row | {"params_hash": "b" * 16} for row in rows]


def dense(run: str, nats: dict[str, float], known: str, **more: Any) -> list[Row]:
    common = {"run": run, "variant": "dense", "expert": "dense"} | more
    return [make_row("known" if d in known else "expert", d, n, **common) for d, n in nats.items()]


def test_a_headline_is_the_known_expert_then_the_first_mixture() -> None:
    dev = {"switch_rate": 0.3, "switch_rate_from": "dev"}
    given = {"switch_rate": 0.1, "switch_rate_from": "given"}
    rows = [
        [alone("med", "law", 1.0), alone("acl", "law", 1.0)],
        [make_row("average", "law", 2.0, switch_rate=1.0)],
        [make_row("uniform", "law", 2.0, **given)],
        [make_row("updating", "law", 2.0, **dev)],
        [make_row("cached", "law", 2.0, top_k=1, **dev)],
        [make_row("cached", "law", 2.0, **given)],
        [make_row("cached", "law", 9.0, **dev)],
        [alone("law", "law", 9.0)],
    ]
    names = [None, "average", "uniform, s=0.1", "updating, s dev", "cached, s dev, top 1"]
    names += ["cached, s=0.1", "cached, s dev", "expert law"]
    for count, name in enumerate(names, start=1):
        found = headline_row([row for group in rows[:count] for row in group])
        assert (headline_name(found) if found else None) == name, count


def test_the_only_stack_is_the_headline_of_every_domain() -> None:
    (row,) = dense("runs/dense", {"acl": 4.0}, known="law")
    assert headline_row([row]) == row
    assert headline_name(row) == "dense"


def test_an_expert_is_gained_and_nothing_is_forgotten() -> None:
    found = compare(before(), after())
    assert found.label() == "demix + acl"
    assert [(c.domain, c.group) for c in found.changes] == [
        ("law", "known before"),
        ("med", "known before"),
        ("acl", "gained"),
    ]
    assert [c.nats for c in found.changes] == [0, 0, -0.5]
    assert found.mean("known before") == 0
    assert found.mean("gained") == -0.5
    assert math.isnan(found.mean("other"))


def test_identical_scores_are_counted_over_experts_in_both() -> None:
    found = compare(before(), after())
    assert (found.same, found.kept) == (5, 6)


def test_a_lost_expert_leaves_the_mixture() -> None:
    rest = [alone("med", "law", 4.0), alone("med", "med", 2.0), cached("law", 3.25)]
    rest[0]["mode"] = "expert"
    found = compare(
        before(), [row | {"params_hash": "c"} for row in [*rest, alone("acl", "law", 6)]]
    )
    assert found.label(minus="−") == "demix + acl − law"
    assert [(c.domain, c.nats) for c in found.changes] == [("law", 0.25), ("med", 0)]
    assert found.mean("known before") == 0.125


def test_labels_say_what_else_may_have_changed() -> None:
    rows = dense("runs/dense", {"law": 3.0}, known="law")
    assert compare(rows, rows).label() == "dense, same experts"
    later = [row | {"checkpoint": 9} for row in rows]
    assert compare(rows, later).label() == "dense, step 7 -> 9"
    many = [alone(name, "law", 3.0) for name in ("law", "b", "c", "d", "e")]
    assert compare(before(), many).label() == "demix + 4 experts - med"


def test_another_text_is_not_compared() -> None:
    rows = after()
    for row in rows:
        row["tokens"] += row["domain"] == "med"
    found = compare(before(), rows)
    assert found.skipped == {"med": "not the same text"}
    assert [c.domain for c in found.changes] == ["law", "acl"]
    assert (found.same, found.kept) == (3, 4)


def test_another_split_is_not_compared() -> None:
    found = compare(before(), [row | {"split": "valid"} for row in after()])
    assert (found.changes, found.skipped, found.kept) == ([], {}, 0)


def test_a_domain_without_a_headline_is_named() -> None:
    found = compare([row for row in before() if row["mode"] != "cached"], after())
    assert found.skipped == {"acl": "no known expert and no mixture before"}


def test_the_newest_rows_is_the_last_of_the_newest_checkpoint() -> None:
    names = [(7, "a"), (8, "b"), (8, "c"), (8, "b"), (7, "d")]
    rows = [alone("law", "law", i, checkpoint=s, params_hash=e) for i, (s, e) in enumerate(names)]
    assert newest_rows(rows) == [rows[1], rows[3]]


def test_a_run_is_compared_with_itself_and_with_its_origin() -> None:
    old = dense("runs/dense", {"law": 3.0, "acl": 4.0}, known="law")
    new = dense("runs/dense_acl", {"law": 3.25, "acl": 3.5}, "law acl", origin="runs/dense")
    found = comparisons([*old, *before()], [*after(), *new])
    assert [pair.label() for pair in found] == ["demix + acl", "dense -> dense_acl"]
    assert (found[1].mean("known before"), found[1].mean("gained")) == (0.25, -0.5)
