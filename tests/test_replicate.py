"""The replication: cells are run once, numbers are paired, and the page is what results say."""

import dataclasses
import json
import math
from pathlib import Path

import forks
import numpy as np
import pytest
import tiny
import zstandard
from scipy import stats

from demix_jax.data.tokenizers import ByteTokenizer
from demix_jax.errors import DemixError
from demix_jax.training.clean_trunk import expert_config, trunk_config
from studies import clean_trunk
from studies.cells import Cell, Workplace, best_rate, bracket, choose_rate, rates_title
from studies.clean_trunk import clean_config
from studies.grid import grid
from studies.page import PAGE, README, page, with_headline
from studies.page_parts import at_least, verdict
from studies.recitation import LENGTH, MATCH, PREFIX, askable, percent
from studies.results import STORED, Estimate, Record, Results, macro, write_record
from studies.runner import run_cells, select
from studies.scales import CPU, GPU, Scale, Size, make_config
from studies.time_needed import estimate

ROOT = Path(__file__).parent.parent
SIZE = Size(
    name="tiny", layers=1, width=16, heads=2, steps=4, batch=8, seeds=(0, 1), rate=1e-2,
    adapt_steps=2, adapt_batch=8, adapt_rate=1e-2, rows=("branched",), factors=(),
)  # fmt: skip
SCALE = Scale(
    name="test", sizes=(SIZE,), vocab_size=0, context=16, train_share=0.5, novel_share=1.0,
    heldout_chars=400, document_chars=100, heldout_document_chars=60, test_tokens=100,
    prior_sequences=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """A workplace with text of three domains, one of them novel, and a sweep that is done."""
    root = tmp_path_factory.mktemp("replication")
    for part, names in {"train": ("law", "med"), "novel": ("chat",)}.items():
        (root / "text" / part).mkdir(parents=True)
        for name in names:
            texts = tiny.sentences(name, 90)
            splits = ("train", "train", "train", "train", "valid", "test")
            lines = [{"text": t, "split": splits[i % 6]} for i, t in enumerate(texts)]
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            path = root / "text" / part / f"{name}.jsonl.zst"
            path.write_bytes(zstandard.compress(text))
    place = Workplace(SCALE, root / "text", root / "out")
    write_record(place.out, record("tiny.sweep.branched", {"best": 1e-2, "losses": {}}))
    return place


def record(cell: str, values: dict) -> Record:
    return Record(cell, 1.0, "a machine", "jax 1", "abc", "2026-01-01", values)


def read(domains: tuple[str, ...], **nats: list[float]) -> dict:
    """Values of a cell that has read some domains."""
    return {"domains": list(domains), "nats": nats}


@pytest.mark.slow
def test_a_cell_and_what_it_needs_run_once(place, capsys):
    cells = select(grid(SCALE), ["tiny.train.branched.s0"])
    names = ["test.prepare", "tiny.sweep.branched", "tiny.train.branched.s0"]
    assert [cell.name for cell in cells] == names
    assert run_cells(place, cells)
    assert "tiny.sweep" not in capsys.readouterr().out  # another machine has done it
    results = place.results
    prepared = results.prepared
    assert (prepared["train"], prepared["novel"]) == (["law", "med"], ["chat"])
    held = [prepared["tokens"][name]["test"] for name in ("law", "med", "chat")]
    assert all(0 < count <= 400 + 60 + 20 for count in held)  # characters, and ends of documents
    values = results.values("tiny.train.branched.s0")
    assert values["domains"] == ["law", "med", "chat"]
    law, med, chat = values["nats"]["known"]
    assert law == values["nats"]["expert law"][0]
    assert med == values["nats"]["expert med"][1]
    assert chat is None
    best = min(values["nats"]["expert law"][2], values["nats"]["expert med"][2])
    assert macro(values, "best expert", ("chat",)) == best
    before = {path: path.stat().st_mtime_ns for path in (place.out / "cells").iterdir()}
    assert run_cells(place, cells)
    assert {p: p.stat().st_mtime_ns for p in (place.out / "cells").iterdir()} == before


def test_unknown_cells_are_named():
    with pytest.raises(DemixError, match=r"no cell fits 'tiny.trian"):
        select(grid(SCALE), ["tiny.trian.*"])


def test_a_sweep_goes_on_until_the_best_rate_is_inside():
    losses = bracket(1e-3, lambda rate: (math.log2(rate / 8e-3)) ** 2)
    assert best_rate(losses)["best"] == 8e-3
    assert {4e-3, 1.6e-2} <= set(losses)

    def fails(rate: float) -> float:
        if rate > 2e-3:
            raise DemixError(f"loss is nan at step 3 with {rate}")
        return -rate

    assert best_rate(bracket(1e-3, fails))["best"] == 2e-3
    unsteady = {5e-4: 4.5, 1e-3: 4.37, 2e-3: 4.69, 4e-3: 4.65, 8e-3: 4.95}
    assert best_rate(bracket(2e-3, unsteady.__getitem__))["best"] == 1e-3


def test_a_sweep_chooses_by_the_mean_of_its_seeds():
    losses = {
        (0, 5e-3): (5.0, 6.0), (0, 1e-2): (4.0, 6.2), (0, 2e-2): (6.0, 6.0),
        (1, 5e-3): (3.0, 5.0), (1, 1e-2): (6.0, 5.0), (1, 2e-2): (7.0, 7.0),
        (0, 2.5e-3): (9.0, 9.0), (1, 2.5e-3): (9.0, 9.0),
    }  # fmt: skip

    def swept(*seeds: int) -> dict:
        size = dataclasses.replace(SIZE, sweep_seeds=seeds)
        return choose_rate(size, 1e-2, lambda seed, rate: losses[seed, rate])

    assert swept(0)["best"] == 1e-2
    both = swept(0, 1)
    assert both["best"] == 5e-3
    assert both["losses"] == {"0.0025": 9.0, "0.005": 4.75, "0.01": 5.3, "0.02": 6.5}
    assert rates_title(SIZE).endswith("validation loss, seed 0")


def test_differences_are_paired_over_the_seeds_that_have_both():
    rng = np.random.default_rng(0)
    ones, others = rng.normal(size=(2, 4))
    records = {}
    for seed in range(4):
        for name, values in (("a", ones), ("b", others)):
            cell = f"tiny.{name}.s{seed}"
            if cell != "tiny.b.s2":
                records[cell] = record(cell, read(("x",), known=[float(values[seed])]))
    found = Results(records).over_seeds(
        lambda a, b: a["nats"]["known"][0] - b["nats"]["known"][0],
        "tiny.a.s{seed}",
        "tiny.b.s{seed}",
    )
    gaps = np.delete(ones - others, 2)
    assert found.numbers == pytest.approx(gaps)
    assert found.mean == pytest.approx(gaps.mean())
    assert found.error == pytest.approx(stats.sem(gaps))


def test_a_verdict_needs_an_interval_on_one_side_of_zero():
    rng = np.random.default_rng(1)
    for _ in range(200):
        numbers = rng.normal(0.5, 1, 3)
        sign = Estimate(tuple(numbers)).sign
        p = stats.ttest_1samp(numbers, 0).pvalue
        assert sign == (np.sign(numbers.mean()) if p < 0.05 else 0)
    clear, unclear, against = (
        Estimate((-1.0, -1.1, -0.9)), Estimate((-1.0, -5.0, 3.0)), Estimate((1.0, 1.1, 0.9))
    )  # fmt: skip
    noise = "within the noise of seeds"
    assert verdict(-1, clear, clear) == "yes"
    assert verdict(-1, clear, against) == verdict(-1, clear, unclear) == "partly"
    assert verdict(-1, unclear) == verdict(1, unclear, unclear) == verdict(0, unclear) == noise
    assert verdict(-1, against) == verdict(-1, against, unclear) == verdict(0, clear) == "no"
    assert verdict(0, Estimate((0.01, -0.01, 0.0))) == "yes"
    assert verdict(0, Estimate((0.1, -0.1, 0.0))) == noise
    assert verdict(-1) == verdict(-1, Estimate(())) == "not run"
    assert verdict(-1, clear, Estimate(())) == verdict(-1, clear, Estimate((-1.0,))) == "partly"
    low, high = Estimate((-1.0,)), Estimate((1.0,))
    assert verdict(-1, low, low) == verdict(0, Estimate((0.01,))) == "one seed: as claimed"
    assert verdict(-1, high) == at_least(2, high) == "one seed: not as claimed"
    assert verdict(-1, low, high) == "one seed: partly"
    found = [at_least(bound, against) for bound in (0.5, 1, 2)]
    assert found == ["yes", noise, "no"]


def test_a_clean_trunk_reads_as_much_as_the_joint_run_and_no_other_domain_matters(tmp_path):
    train = ("cs", "legal", "med", "news", "realnews", "reddit", "reviews", "web")
    place = Workplace(CPU, tmp_path, tmp_path)
    write_record(tmp_path, record("cpu.prepare", {"train": train, "novel": ()}))
    for size in CPU.sizes:
        joint = make_config(CPU, size, "branched", data=place.data, rate=1e-3, seed=1)
        clean = clean_config(place, size, 1, 1e-3, train)
        trunk = trunk_config(clean)
        public = trunk.data.train_domains
        experts = {name: expert_config(clean, name, Path("trunk")) for name in train}
        read = sum(
            config.train.steps * config.train.batch_size * len(config.data.train_domains)
            for config in (trunk, *experts.values())
        )
        assert read == joint.train.steps * joint.train.batch_size * len(train)
        assert set(train) - set(public) == {"legal", "med", "reddit"}
        never = clean_config(place, size, 1, 1e-3, [name for name in train if name != "legal"])
        assert trunk_config(never) == trunk
        assert expert_config(never, "med", Path("trunk")) == experts["med"]


def test_what_is_recited_is_counted_from_the_first_tokens():
    texts = [np.arange(66, 66 + PREFIX + LENGTH), np.arange(40)]
    ended = texts[0].copy()
    ended[50] = ByteTokenizer().eod
    assert [ids.tolist() for ids in askable(ByteTokenizer(), [*texts, ended])] == [
        texts[0].tolist()
    ]
    assert percent(np.array([0, MATCH - 1, MATCH, LENGTH])) == 50


def test_a_removal_that_took_nothing_that_was_recited_proves_nothing():
    def leaks(before: float, after: float) -> dict:
        found = {"as trained": {"greedy": before}, "expert removed": {"greedy": after}}
        return {"found": {"joint": found, "clean": found}}

    for numbers, expected in (
        (((80, 0), (60, 0)), "yes"),
        (((80, 80), (60, 60)), "no"),
        (((80, 0), (60, 0), (0, 0)), "partly"),
        (((0, 0), (0, 0)), "not testable"),
    ):
        cells = {f"tiny.leak.s{i}": record("", leaks(*pair)) for i, pair in enumerate(numbers)}
        prepare = record("", {"train": ["law", "med"], "novel": []})
        results = Results(cells | {"test.prepare": prepare})
        found = {
            c.claim: c.verdict for c in clean_trunk.claims(results, SIZE) if "recited" in c.claim
        }
        assert set(found.values()) == {expected}


def test_the_page_is_what_the_stored_results_say():
    results = Results.read_stored()
    assert results.records
    assert page(results) == PAGE.read_text()
    assert with_headline(README.read_text(), results) == README.read_text()
    assert sum(path.stat().st_size for path in STORED.glob("*")) < 1_000_000
    for line in PAGE.read_text().split("![")[1:]:
        assert (PAGE.parent / line.partition("(")[2].partition(")")[0]).exists()


def test_stored_results_are_read_as_written(tmp_path):
    results = Results.read_stored()
    results.store(tmp_path)
    assert Results.read_stored(tmp_path).records == results.records


def test_cells_of_a_gpu_take_as_many_trainings_as_those_that_ran():
    lines = (STORED / "medium.jsonl").read_text().splitlines()
    seconds = {r["cell"]: r["seconds"] for r in map(json.loads, lines)}
    trained = [s for name, s in seconds.items() if name.startswith("medium.train.dense.s")]
    cells = grid(GPU)

    def found(name: str) -> float:
        total, unknown = estimate([cells[name]], Results({}))
        assert unknown == 0
        return total

    trainings = found("125m.sweep.dense") / found("125m.train.dense.s0")
    assert trainings == pytest.approx(seconds["medium.sweep.dense"] / np.mean(trained))
    longer = found("350m.sweep.dense") / found("125m.sweep.dense")
    assert longer == pytest.approx(found("350m.leak.s0") / found("125m.leak.s0"))
    assert longer > 2  # more than twice the parameters
    assert estimate([Cell("gpu.unheard", lambda place: {})], Results({})) == (0, 1)
    measured = Results({"125m.train.dense.s0": record("125m.train.dense.s0", {})})
    assert estimate([cells["125m.train.dense.s0"]], measured) == (1.0, 0)  # as `record` says


def test_newer_results_replace_those_of_the_same_cell_and_no_others():
    one, other, third = (record(f"tiny.{name}", {"at": name}) for name in "abc")
    newer = record("tiny.b", {"at": "later"})
    stored = Results({r.cell: r for r in (one, other)})
    assert stored.updated(Results({r.cell: r for r in (newer, third)})).records == {
        "tiny.a": one,
        "tiny.b": newer,
        "tiny.c": third,
    }


@pytest.mark.slow
def test_the_command_lists_its_cells(tmp_path):
    program = "import runpy; runpy.run_path('launch/replicate.py', run_name='__main__')"
    done = forks.python(program, "--list", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "small.train.demix.s0" in done.stdout
    assert "cells left, about" in done.stdout
    done = forks.python(program, "--out", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--data_dir is needed" in done.stderr
