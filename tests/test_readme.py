"""The README: short, one picture of the house, and true of the last `make run`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from edits import make_run

from bench.refresh_docs import DOCUMENTS, refresh, tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RUNS = ROOT / "runs" / "quick"
needs_run = pytest.mark.skipif(
    not (RUNS / "report" / "report.html").exists(), reason="`make run` has not been run here"
)


def block(text: str, first: str) -> str:
    """Returns the code block of a document that begins with `first`."""
    return next(b for b in text.split("```")[1::2] if b.lstrip().startswith(first)).strip("\n")


def rows(folder: str) -> list[dict[str, Any]]:
    return json.loads((RUNS / folder / "results.json").read_text())["rows"]


def known(variant: str) -> dict[str, float]:
    """Nats per token of each training domain, read by its own expert."""
    return {
        row["domain"]: row["nats_per_token"]
        for row in rows("results")
        if row["mode"] == "known" and row["variant"] == variant and not row["novel"]
    }


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_the_output_shown_is_short_and_narrow():
    lines = block(README, "known domain").splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100


def test_readme_and_architecture_show_the_same_house():
    house = block(README, "demix_jax/")
    assert len(house.splitlines()) <= 12
    assert house in (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"(\w+)/", house)) - {"demix_jax"}
    packages = {path.parent.name for path in (ROOT / "demix_jax").glob("*/__init__.py")}
    assert named == packages


@pytest.mark.slow
def test_the_python_shown_runs(tmp_path, monkeypatch, capsys):
    """On a run of random numbers: what it prints is of no use, but complete."""
    make_run(tmp_path / "runs" / "quick" / "demix", ("python", "cpp"), context=64)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block(README, "python\nimport").removeprefix("python"), names)
    assert names["two"].experts == names["lm"].experts == ("python", "cpp")
    assert len(names["made"].speakers) == len("def main(") + names["made"].generated
    shown = capsys.readouterr().out
    assert shown.startswith("('python', 'cpp')\n")
    assert shown.endswith("".join(names["piece"].result.text))


def test_files_that_the_documents_name_exist():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh))`", document.read_text()):
            if name.startswith("domain_loader/"):  # of the code released with the paper
                continue
            places = (ROOT / name, ROOT / "demix_jax" / name)
            assert any(path.exists() for path in places), f"{document.name} names {name}"


@needs_run
def test_every_expert_is_the_best_one_for_its_domain():
    alone = [r for r in rows("results") if r["variant"] == "demix" and r["expert"]]
    for domain in known("demix"):
        best = min((r for r in alone if r["domain"] == domain), key=lambda r: r["nats_per_token"])
        assert best["expert"] == domain


@needs_run
def test_demix_is_ahead_on_known_domains_and_on_novel_text():
    demix, dense = known("demix"), known("dense_balanced")
    assert len(demix) == len(dense) == 8
    assert 0.08 < mean(dense.values()) - mean(demix.values()) < 0.2
    novel = [r for r in rows("results") if r["novel"]]
    plain = mean(r["nats_per_token"] for r in novel if r["variant"] == "dense_balanced")
    cached = [r for r in novel if r["mode"] == "cached"]
    paper, chosen = (
        mean(r["nats_per_token"] for r in cached if r["switch_rate_from"] == source)
        for source in ("given", "dev")
    )
    assert chosen < paper < plain


@needs_run
def test_adaptation_forgets_nothing_and_learns_the_new_domain():
    def scores(folder: str) -> dict[tuple[str, str], float]:
        alone = [r for r in rows(folder) if r["variant"] == "demix" and r["expert"]]
        return {(r["expert"], r["domain"]): r["nats"] for r in alone}

    before, after = scores("results"), scores("results_extended")
    assert len(before) == 96
    assert {key: after[key] for key in before} == before
    tokens = next(r["tokens"] for r in rows("results") if r["domain"] == "italian")
    best = min(value for (_, domain), value in before.items() if domain == "italian")
    assert (best - after["italian", "italian"]) / tokens > 0.1


@needs_run
def test_nothing_of_the_removed_expert_was_found():
    (receipt,) = (RUNS / "reduced" / "receipts").glob("*-remove-legal.json")
    scan = json.loads(receipt.read_text())["scan"]
    assert (scan["findings"], scan["unread"]) == ([], [])


@needs_run
def test_the_numbers_shown_are_those_of_the_last_run():
    """Within what another processor's order of sums moves after 400 steps."""
    table = block(README, "known domain")
    for domain, nats in known("demix").items():
        shown = re.search(rf"^{domain} .*", table, re.MULTILINE)[0].split()
        assert float(shown[-2]) == pytest.approx(nats, abs=0.05)
        assert float(shown[2]) == pytest.approx(known("dense_balanced")[domain], abs=0.05)


def test_documents_take_their_tables_from_a_log():
    shown = [b for name in DOCUMENTS for b in (ROOT / name).read_text().split("```")[1::2]]
    log = "".join(f"== 1/7 a step\nsomething\n{b}\nreading\n" for b in shown).replace("7", "8")
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        new = refresh(text, tables(log))
        assert new.split("```")[0::2] == text.split("```")[0::2]
        old, taken = text.split("```")[1::2], new.split("```")[1::2]
        changed = [i for i in range(len(old)) if old[i] != taken[i]]
        assert len(changed) == {"README.md": 1, "docs/quickstart.md": 3}[name]
        assert all(taken[i] == old[i].replace("7", "8") for i in changed)
