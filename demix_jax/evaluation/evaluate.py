"""`demix evaluate`: runs on held-out text, every expert alone and mixed in every asked way.

A cell is one (checkpoint, text, mode, switch rate, top k). Finished cells are files in
`<out>/cells/`, named by the hash of all that decides them: an interrupted evaluation goes on where
it was, and several processes can share one folder. `<out>/results.json` collects them.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from demix_jax.checkpoint.metrics_log import Clock, duration
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError, suggest
from demix_jax.evaluation.cached_priors import METHODS
from demix_jax.evaluation.evaluator import MODES, RELEASED, EvalSetting, Evaluator, Text
from demix_jax.mixing.filter import check_switch_rate, check_top_k
from demix_jax.parallel.distributed import assert_same_on_all, barrier, count_processes, is_primary
from demix_jax.report.results import read_rows
from demix_jax.report.tables import (
    Row,
    averages,
    change_table,
    known_table,
    matrix_table,
    mixture_table,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate.

    Attributes:
      domains: names; () means the domains each run was trained on.
      split: train, valid or test.
      tokens: of each domain, rounded up to whole documents; 0 means the whole split.
      batch_size: sequences scored at once; changes no result beyond rounding.
      modes: of MODES. "known" scores each expert alone, a domain's own expert among them.
      switch_rates: numbers in [0, 1], or "dev": the one that reads 100 validation sequences of the
        domain best.
      top_k: experts kept; 0 means all.
      prior_method: of cached priors, average (the paper) or em.
      refresh_priors: estimate cached priors anew, also where a file exists.
      shard: (i, n): do only every n-th (run, domain) pair, beginning with the i-th. Processes of
        a job share all pairs out instead, and process 0 collects what they found.
    """

    domains: tuple[str, ...] = ()
    split: str = "test"
    tokens: int = 0
    batch_size: int = 16
    modes: tuple[str, ...] = ("known",)
    switch_rates: tuple[str, ...] = ("0", "dev")
    top_k: tuple[int, ...] = (0,)
    prior_method: str = "average"
    refresh_priors: bool = False
    shard: tuple[int, int] = (0, 1)

    def validate(self) -> None:
        """Raises DemixError for an unknown mode or method, or a number out of range."""
        for mode in self.modes:
            if mode not in MODES:
                raise DemixError(
                    f"unknown mode {mode!r}{suggest(mode, MODES)} (modes: {', '.join(MODES)})"
                )
        if self.prior_method not in METHODS:
            raise DemixError(f"prior_method {self.prior_method!r}: use {' or '.join(METHODS)}")
        for rate in set(self.switch_rates) - {"dev"}:
            try:
                number = float(rate)
            except ValueError:
                raise DemixError(f"switch rate {rate!r}: use a number or 'dev'") from None
            check_switch_rate(number)
        if not 0 <= self.shard[0] < self.shard[1]:
            raise DemixError(f"shard {self.shard[0]}/{self.shard[1]}: use i/n with 0 <= i < n")


def evaluate(
    workdirs: Sequence[Path],
    out: Path,
    settings: Settings,
    data_dir: str = "",
    *,
    before: Path | None = None,
) -> list[Row]:
    """Evaluates the newest checkpoint of each run; writes results and prints tables.

    Args:
      workdirs: one or more runs.
      out: folder of results, created.
      settings: what to evaluate.
      data_dir: prepared data; "" means what each run was trained on.
      before: results of an earlier evaluation, to print what has changed since.

    Returns:
      The rows of all asked cells, in order; those of this shard, or of this process if it is not
      process 0 of a job.

    Raises:
      DemixError: no run or checkpoint, an unknown domain or mode, data of another tokenizer,
        priors of other experts, a results folder of other runs, parameters that are not finite,
        no results in `before`.
    """
    settings.validate()
    earlier = read_rows(before / "results.json") if before else None
    evaluators, work = _open(workdirs, settings, data_dir)
    results = Results(out, {str(e.run.workdir): e.version.hash for e in evaluators})
    index, shards = settings.shard
    if count_processes() > 1:
        assert_same_on_all({"out": out} | dataclasses.asdict(settings))
        index, shards = jax.process_index(), count_processes()
    rows: list[Row] = []
    clock = Clock(0)
    for done, (evaluator, name) in enumerate(work[index::shards], start=1):
        text = evaluator.text(name, settings.split, settings.tokens)
        rows += _finish(evaluator, text, settings, results)
        left = (len(work[index::shards]) - done) / clock.total(done)
        print(
            f"evaluated {evaluator.run.workdir.name} on {name}: {text.tokens:,} tokens "
            f"({done}/{len(work[index::shards])}, eta {duration(left)})",
            flush=True,
        )
    if count_processes() > 1:
        barrier("all have scored")
        if not is_primary():
            return rows
        _, work = _open(workdirs, dataclasses.replace(settings, refresh_priors=False), data_dir)
        texts = ((e, e.text(name, settings.split, settings.tokens)) for e, name in work)
        rows = [row for e, text in texts for row in _finish(e, text, settings, results)]
    results.collect()
    matrices = [matrix_table(str(workdir), rows) for workdir in workdirs]
    changes = "" if earlier is None else change_table(earlier, rows)
    tables = [*matrices, known_table(rows), mixture_table(rows), changes]
    print("\n\n".join(table for table in tables if table))
    print(f"results: {results.path}")
    return rows


def _open(
    workdirs: Sequence[Path], settings: Settings, data_dir: str
) -> tuple[list[Evaluator], list[tuple[Evaluator, str]]]:
    """The runs, and each with every domain that it is to read; checks that all can be done."""
    evaluators = []
    for workdir in workdirs:
        run = load_run(workdir)
        evaluator = Evaluator(
            run,
            PreparedData(data_dir or run.config.data.dir),
            batch_size=settings.batch_size,
            prior_method=settings.prior_method,
            refresh=settings.refresh_priors,
        )
        for k in settings.top_k if evaluator.several else ():
            check_top_k(k or None, len(evaluator.version.experts))
        evaluators.append(evaluator)
    work = [(e, name) for e in evaluators for name in settings.domains or e.known]
    for evaluator, name in work:
        evaluator.data.meta(name)
    return evaluators, work


def _finish(evaluator: Evaluator, text: Text, settings: Settings, results: "Results") -> list[Row]:
    """Does the cells of one text that are not done yet; returns the rows of all."""
    cells = _cells(evaluator, text, settings)
    names = {cell: _cell_hash(evaluator, text, cell) for cell in cells}
    missing = [cell for cell in cells if results.find(names[cell]) is None]
    narrow = all(cell.mode == "cached" and cell.top_k for cell in missing)
    for cell in missing:
        rows = evaluator.rows(text, cell, narrow)
        order = cells.index(cell)
        results.add(names[cell], [row | {"cell": names[cell], "order": order} for row in rows])
    for name in names.values():
        results.mark(name, evaluator.version.hash)
    mixes = any(cell.mode != "known" for cell in missing)
    if mixes and not narrow:
        results.trace(evaluator, text)
    return [row for cell in cells for row in results.find(names[cell]) or []]


def _cells(evaluator: Evaluator, text: Text, settings: Settings) -> list[EvalSetting]:
    """Every asked cell of a text; a model with one feed-forward stack has nothing to mix."""
    cells = []
    for mode in settings.modes if evaluator.several else ("known",):
        if mode == "known" or mode in RELEASED:
            cells.append(EvalSetting(mode))
        elif mode == "average":
            cells.append(EvalSetting(mode, 1.0))
        else:
            for asked, top_k in itertools.product(settings.switch_rates, settings.top_k):
                source = "dev" if asked == "dev" else "given"
                cells.append(EvalSetting(mode, _rate(evaluator, text, mode, asked), top_k, source))
    return list(dict.fromkeys(cells))


def _rate(evaluator: Evaluator, text: Text, mode: str, rate: str) -> float:
    if rate != "dev":
        return float(rate)
    prior = evaluator.prior(text.domain)
    return prior.switch_rate if mode == "cached" else prior.uniform_switch_rate


def _cell_hash(evaluator: Evaluator, text: Text, cell: EvalSetting) -> str:
    decides = [str(evaluator.run.workdir), evaluator.version.hash, text.domain, text.split]
    decides += [text.version, repr(cell)]
    if cell.mode == "cached":
        decides.append(repr(evaluator.prior(text.domain).weights))
    return _digest(json.dumps(decides))


class Results:
    """A folder of results, shared by any number of processes.

    Args:
      out: the folder.
      runs: each with the edition that is evaluated now; of others the folder keeps the cells only.
    """

    def __init__(self, out: Path, runs: Mapping[str, str]):
        self.path, self._runs, self._cells = out / "results.json", dict(runs), out / "cells"
        self._traces = out / "traces"
        others = {row["run"] for row in self._rows()} - set(runs)
        if others:
            raise DemixError(
                f"{out} holds results of {', '.join(sorted(others))}, asked for {', '.join(runs)}; "
                "use another --out"
            )
        self._cells.mkdir(parents=True, exist_ok=True)

    def find(self, cell: str) -> list[Row] | None:
        """The rows of a cell; None when it is still to do."""
        path = self._cells / f"{cell}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def add(self, cell: str, rows: Sequence[Row]) -> None:
        """Writes the rows of a cell, whole or not at all."""
        _write(self._cells / f"{cell}.json", json.dumps(rows))

    def mark(self, cell: str, edition: str) -> None:
        """Names the edition in the rows of a cell written before rows had one."""
        rows = self.find(cell) or []
        if any("edition" not in row for row in rows):
            self.add(cell, [row | {"edition": edition} for row in rows])

    def trace(self, evaluator: Evaluator, text: Text) -> None:
        """Keeps how the posterior of some documents evolves."""
        self._traces.mkdir(exist_ok=True)
        workdir = evaluator.run.workdir
        path = self._trace_path(str(workdir), text.domain)
        names = np.array(evaluator.version.experts)
        arrays = {f"{workdir}|{text.domain}": evaluator.trace(text), f"experts|{workdir}": names}
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        partial.replace(path)

    def collect(self) -> None:
        """Writes `results.json` and `traces.npz` from what all processes have done so far.

        Rows of another edition, of experts that are no more or have changed, are left out.
        """
        newest: dict[tuple, Row] = {}  # a rate chosen on dev may have moved: it is no key
        keys = ("run", "domain", "split", "mode", "expert", "top_k", "switch_rate_from")
        for row in self._rows():
            if row.get("edition") != self._runs[row["run"]]:
                continue
            rate = None if row["switch_rate_from"] == "dev" else row["switch_rate"]
            newest[*(row[key] for key in keys), rate] = row
        runs = list(self._runs)
        rows = sorted(newest.values(), key=lambda r: (runs.index(r["run"]), r["order"]))
        values = {"rows": rows, "averages": averages(rows)}
        _write(self.path, json.dumps(values, indent=1) + "\n")
        self._collect_traces({self._trace_path(row["run"], row["domain"]) for row in rows})

    def _collect_traces(self, paths: Collection[Path]) -> None:
        traces: dict[str, np.ndarray] = {}
        for path in sorted(path for path in paths if path.exists()):
            traces |= dict(np.load(path))
        whole = self.path.with_name("traces.npz")
        if not traces:
            whole.unlink(missing_ok=True)
            return
        partial = self.path.with_name("traces.npz.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **traces)  # type: ignore[arg-type]
        partial.replace(whole)

    def _trace_path(self, run: str, domain: str) -> Path:
        return self._traces / f"{_digest(f'{run} {self._runs[run]} {domain}')}.npz"

    def _rows(self) -> list[Row]:
        files = sorted(self._cells.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        return [row for file in files for row in json.loads(file.read_text())]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{_digest(text)}.partial")
    partial.write_text(text)
    partial.replace(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
