"""Every benchmark starts and says what it takes."""

import subprocess
import sys
from pathlib import Path

import forks
import pytest

from bench import measure

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path.name for path in (ROOT / "bench").glob("*.py") if "ArgumentParser" in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_answers_help(script):
    program = "import runpy; runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
    done = forks.python(program.format(f"bench.{script.removesuffix('.py')}"), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_the_documents_hold_the_tables_of_the_results():
    results = [measure.load(path) for path in sorted(measure.RESULTS.glob("*.json"))]
    text = measure.DOCS.read_text()
    for result in results:
        assert f"<!-- bench:{result.suite} -->" in text, result.suite
    assert measure.render_docs(text, results) == text


def test_a_table_is_put_between_its_marks_and_nowhere_else():
    said = {
        "device": "CPU",
        "versions": "jax 1",
        "date": "2026-01-01",
        "command": "python -m bench",
    }
    rows = [{"step": "a", "tokens/s": 1234.5, "x b": None}, {"step": "b", "tokens/s": 0.5}]
    text = "a\n<!-- bench:train -->\nold\n<!-- end -->\nb\n<!-- bench:score -->\n<!-- end -->\n"
    empty = text.replace("old\n", "")
    found = measure.render_docs(text, [measure.Result("train", rows, said)])
    assert measure.render_docs(empty, [measure.Result("train", rows, said)]) == found
    table = "| step | tokens/s |\n| --- | ---: |\n| a | 1,234 |\n| b | 0.5 |"
    origin = "`python -m bench`: CPU, jax 1, 2026-01-01."
    assert found == text.replace("old", f"{origin}\n\n{table}")
    assert measure.render_docs(found, [measure.Result("train", rows, said)]) == found


def test_interleaved_calls_alternate_and_the_first_rounds_are_left_out():
    seen = []
    calls = {name: lambda name=name: seen.append(name) or float(len(seen)) for name in "ab"}
    assert measure.interleave(calls, rounds=2, warmup=1) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert seen == list("ababab")
    assert measure.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_an_unknown_suite_is_named():
    command = [sys.executable, "-m", "bench", "--suite=speed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no suite speed; choose from train, score" in done.stderr
