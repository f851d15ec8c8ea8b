"""The table of changes, against its text by hand."""

from test_comparison import after, before, dense

from demix_jax.report.tables import change_table, signed


def test_the_table_of_an_added_expert() -> None:
    assert change_table(before(), after()) == "\n".join(
        [
            "before and after, nats/token: demix + acl",
            "                      before                      after              change",
            "domains known before",
            "  law                 3.0000  expert law         3.0000  expert law         0",
            "  med                 2.0000  expert med         2.0000  expert med         0",
            "  macro average       2.5000                     2.5000                     0",
            "other domains",
            "  acl                 4.5000  cached, s dev      4.0000  expert acl   -0.5000",
            "  macro average       4.5000                     4.0000               -0.5000",
            "5 of 6 scores of experts that were there before are identical to the last bit",
        ]
    )


def test_several_runs_are_several_tables() -> None:
    old = dense("runs/dense", {"law": 3.0, "acl": 4.0}, known="law")
    new = dense("runs/dense_acl", {"law": 3.25, "acl": 3.5}, "law acl", origin="runs/dense")
    first, second = change_table([*old, *before()], [*after(), *new]).split("\n\n")
    assert first == change_table(before(), after())
    lines = [line.split() for line in second.splitlines()]
    assert lines[0][-3:] == ["dense", "->", "dense_acl"]
    assert ["law", "3.0000", "dense", "3.2500", "dense", "+0.2500"] in lines
    assert ["acl", "4.0000", "dense", "3.5000", "dense", "-0.5000"] in lines
    assert lines[-1][:3] == ["0", "of", "2"]


def test_domains_that_cannot_be_compared_are_named() -> None:
    text = change_table([row for row in before() if row["mode"] != "cached"], after())
    assert "not compared: acl (no known expert and no mixture before)" in text


def test_no_domain_in_common() -> None:
    text = change_table(before(), [row | {"split": "valid"} for row in after()])
    assert text.splitlines()[1:] == [
        "no domain in common",
        "no expert that was there before was scored alone on the same text",
    ]


def test_nothing_in_common_says_so() -> None:
    old = dense("runs/dense", {"law": 3.0}, known="law")
    for rows, name in (([], "no run"), (old, "runs/dense")):
        assert change_table(rows, after()) == (
            f"before and after: nothing in common; results of {name} before, runs/demix after"
        )


def test_only_what_is_exactly_zero_is_written_0() -> None:
    values = [signed(number, 3) for number in (0.0, -0.0, 1e-9, -1e-9, 0.5, float("nan"))]
    assert values == ["0", "0", "+0.000", "-0.000", "+0.500", ""]
