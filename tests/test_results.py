"""A folder of results: the rows collected of several checkpoints, without a model."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_comparison import alone

from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluate import Results, Settings, evaluate
from demix_jax.report.results import Row, short_names
from demix_jax.report.tables import change_table, known_table

RUN = "runs/demix"


def test_runs_have_the_shortest_names_that_tell_them_apart() -> None:
    for runs, names in (
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/demix"], ["demix"]),
        (["/a/demix", "/b/demix", "/b/dense"], ["a/demix", "b/demix", "dense"]),
        (["/x/a/demix", "/y/a/demix"], ["x/a/demix", "y/a/demix"]),
        (["/demix", "/b/demix"], ["/demix", "b/demix"]),
        (["demix", "a/demix"], ["demix", "a/demix"]),
    ):
        assert list(short_names(runs).values()) == names
        rows = [alone("law", "law", 3.0) | {"run": run, "mode": "known"} for run in runs]
        units = dict.fromkeys(("perplexity", "nats_per_token", "bits_per_byte"), 1.0)
        head = known_table([row | units for row in rows]).splitlines()[0]
        assert head.split() == ["known", "domain", *names]
        if len(runs) == 2:
            assert (
                change_table(rows[:1], [rows[1] | {"origin": runs[0]}])
                .splitlines()[0]
                .endswith(f": {names[0]} -> {names[1]}")
            )


def test_the_same_run_spelled_otherwise_or_moved_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    row = alone("law", "law", 3.0) | {"run": f"{tmp_path}/link/demix"} | cell("1", "b")
    place = str(tmp_path / "demix")
    for run in (place, str(tmp_path / "link" / "demix")):
        results = Results(tmp_path / "out", {run: "a"})
        results.add("1", [row])
    with pytest.raises(DemixError, match="holds results of .*demix, asked for /other"):
        Results(tmp_path / "out", {"/other": "a"})
    Results(tmp_path / "out", {"/moved": "b"}).collect()  # of the same parameters


def cell(name: str, params_hash: str) -> Row:
    """What a row of a file of its own has too."""
    more = {"cell": name, "order": 0, "params_hash": params_hash, "novel": False}
    return more | {"bits_per_byte": 1.0, "nats_per_token": 1.0, "perplexity": 2.0}


def fill(out: Path, params_hash: str, rows: dict[str, Row]) -> Results:
    """One evaluation; a file holds one row, and is older than those written later."""
    results = Results(out, {RUN: params_hash})
    for name, row in rows.items():
        results.add(name, [row | cell(name, params_hash)])
    results.collect()
    return results


def collected(out: Path) -> list[tuple[str, str, float]]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [(row["expert"], row["domain"], row["nats"] / row["tokens"]) for row in rows]


def test_a_removed_expert_does_not_linger(tmp_path: Path) -> None:
    both = {"1": alone("law", "law", 3.0), "2": alone("med", "law", 4.0)}
    fill(tmp_path, "a", both | {"3": alone("med", "med", 2.0)})
    fill(tmp_path, "b", {"4": alone("med", "law", 4.0)})
    assert collected(tmp_path) == [("med", "law", 4.0)]
    averages = json.loads((tmp_path / "results.json").read_text())["averages"]
    assert averages == []


def test_bits_per_byte_of_text_that_is_lost_carry_a_warning(tmp_path: Path) -> None:
    rows = {"1": alone("law", "law", 3.0), "2": alone("law", "med", 3.0) | {"round_trip": 0.8}}
    fill(tmp_path, "a", rows)
    warning = json.loads((tmp_path / "results.json").read_text())["warning"]
    assert warning == (
        "warning: bits/byte do not count for med: the tokenizer gives back only 80.00% of the "
        "characters"
    )
    fill(tmp_path, "b", {"3": alone("law", "law", 3.0)})
    assert json.loads((tmp_path / "results.json").read_text())["warning"] == ""


def test_a_checkpoint_that_comes_back_is_collected_again(tmp_path: Path) -> None:
    fill(tmp_path, "a", {"1": alone("law", "law", 3.0)})
    fill(tmp_path, "b", {"2": alone("law", "law", 4.0)})
    fill(tmp_path, "a", {})  # everything is done
    assert collected(tmp_path) == [("law", "law", 3.0)]


def test_shards_of_one_checkpoint_add_up_and_the_newest_row_counts(tmp_path: Path) -> None:
    fill(tmp_path, "a", {"1": alone("law", "law", 3.0), "2": alone("law", "med", 5.0)})
    os.utime(tmp_path / "cells" / "1.json", ns=(1, 1))
    fill(tmp_path, "a", {"3": alone("med", "med", 2.0), "4": alone("law", "law", 3.5)})
    assert set(collected(tmp_path)) == {
        ("law", "law", 3.5),
        ("law", "med", 5.0),
        ("med", "med", 2.0),
    }


class Evaluator:
    """A stand-in for the evaluator of `Results.trace`."""

    def __init__(self, *experts: str):
        self.run = self.checkpoint = self
        self.workdir, self.experts = Path(RUN), experts

    def trace(self, text: Any) -> np.ndarray:
        return np.zeros((1, 8, len(self.experts)), np.float32)


class Text:
    def __init__(self, domain: str):
        self.domain = domain


def test_traces_of_a_checkpoint_that_is_no_more_are_left_out(tmp_path: Path) -> None:
    rows = {"1": alone("law", "law", 3.0), "2": alone("law", "med", 5.0)}
    first = fill(tmp_path, "a", rows)
    for domain in ("law", "med"):
        first.trace(Evaluator("law", "med"), Text(domain))  # type: ignore[arg-type]
    first.collect()
    second = fill(tmp_path, "b", {"3": rows["1"], "4": rows["2"]})
    assert not (tmp_path / "traces.npz").exists()
    second.trace(Evaluator("law", "med", "acl"), Text("med"))  # type: ignore[arg-type]
    second.collect()
    with np.load(tmp_path / "traces.npz") as traces:
        assert set(traces) == {f"{RUN}|med", f"experts|{RUN}"}
        assert traces[f"{RUN}|med"].shape[-1] == 3


def test_what_came_before_is_read_before_anything_is_evaluated(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    with pytest.raises(DemixError, match=r"earlier has no results\.json"):
        evaluate([tmp_path / "no run"], tmp_path / "out", Settings(), before=earlier)
    earlier.mkdir()
    (earlier / "results.json").write_text("{")
    with pytest.raises(DemixError, match=r"results\.json is damaged"):
        evaluate([tmp_path / "no run"], tmp_path / "out", Settings(), before=earlier)
    assert not (tmp_path / "out").exists()
