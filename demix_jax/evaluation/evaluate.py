"""`demix evaluate`: runs on held-out text, every expert alone and mixed in every asked way.

The rows of each (checkpoint, text, mode, switch rate, top k) are a file in `<out>/cells/`, named by
the hash of all that decides them: an interrupted evaluation goes on where it was, and several
processes can share one folder. `<out>/results.json` collects them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from demix_jax.checkpoint.metrics_log import StepTimer, duration
from demix_jax.checkpoint.run_dir import Run, load_run
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.given_domains import prepare_given
from demix_jax.errors import DemixError, suggest
from demix_jax.evaluation.evaluator import KNOWN, EvalSetting, Evaluator, Text
from demix_jax.evaluation.settings import Settings
from demix_jax.files import PARTIAL, open_whole, resolve_path, write_json, write_whole
from demix_jax.mixing.filter import check_switch_rate, check_top_k
from demix_jax.mixing.modes import MODES
from demix_jax.parallel.distributed import (
    assert_same_on_all,
    barrier,
    count_processes,
    is_primary,
    on_primary,
)
from demix_jax.report.results import (
    Row,
    asked_switch_rate,
    averages,
    lossy_warning,
    read_cell,
    read_rows,
    short_names,
)
from demix_jax.report.tables import change_table, known_table, matrix_table, mixture_table
from demix_jax.typed_files import read_arrays, seal

_WRITING = 600  # seconds after which a file that is not whole belongs to no process any more


def evaluate(
    workdirs: Sequence[Path],
    out: Path,
    settings: Settings,
    data_dir: str = "",
    *,
    before: Path | None = None,
    fallback: bool = False,
) -> list[Row]:
    """Evaluates the newest checkpoint of each run; writes results and prints tables.

    Args:
      workdirs: folders of one or more runs.
      out: folder of results, created.
      settings: domains, modes and the like.
      data_dir: prepared data; "" means the data each run was trained on.
      before: folder of earlier results, to print what has changed since.
      fallback: True to take the newest step that is whole, if the newest is damaged.

    Returns:
      The rows of all asked settings, in order; those of this shard, or of this process if it is not
      process 0 of a job.

    Raises:
      DemixError: no run or checkpoint, an unknown domain or mode, data of another tokenizer,
        priors of other experts, a results folder of other runs, parameters that are not finite,
        no results in `before`.
    """
    _check(settings)
    workdirs = [Path(resolve_path(workdir)) for workdir in workdirs]  # rows name runs by them
    earlier = read_rows(before / "results.json") if before else None
    settings = _prepare_given(workdirs, settings, data_dir)
    runs = [load_run(workdir, fallback=fallback) for workdir in workdirs]
    evaluators, work = _open(runs, settings, data_dir)
    results = Results(out, {str(e.run.workdir): e.checkpoint.params_hash for e in evaluators})
    index, shards = settings.shard
    if count_processes() > 1:
        assert_same_on_all({"out": out} | dataclasses.asdict(settings))
        index, shards = jax.process_index(), count_processes()
    rows: list[Row] = []
    clock, own = StepTimer(0), work[index::shards]
    for done, (evaluator, name) in enumerate(own, start=1):
        text = evaluator.text(name, settings.split, settings.tokens)
        rows += _finish(evaluator, text, settings, results)
        left = (len(own) - done) / clock.total(done)
        print(
            f"evaluated {evaluator.name} on {name}: {text.tokens:,} tokens "
            f"({done}/{len(own)}, eta {duration(left)})",
            flush=True,
        )
    if count_processes() > 1:
        barrier("all have scored")
        if not is_primary():
            return rows
        _, work = _open(runs, dataclasses.replace(settings, refresh_priors=False), data_dir)
        texts = ((e, e.text(name, settings.split, settings.tokens)) for e, name in work)
        rows = [row for e, text in texts for row in _finish(e, text, settings, results)]
    results.collect()
    matrices = [matrix_table(str(workdir), rows) for workdir in workdirs]
    changes = "" if earlier is None else change_table(earlier, rows)
    tables = [*matrices, known_table(rows), mixture_table(rows), changes, lossy_warning(rows)]
    print("\n\n".join(table for table in tables if table))
    print(f"results: {results.path}")
    return rows


def _prepare_given(workdirs: Sequence[Path], settings: Settings, data_dir: str) -> Settings:
    """Prepares the domains that are given with their text, for every run; names them alone."""
    names = list(settings.domains)
    for workdir in workdirs:
        folder = data_dir or load_run(workdir).config.data.dir
        prepare = functools.partial(prepare_given, settings.domains, folder, workdir)
        names = on_primary(prepare)
    return dataclasses.replace(settings, domains=tuple(names))


def _check(settings: Settings) -> None:
    """Raises DemixError for an unknown mode, or a number out of range."""
    modes = (KNOWN, *MODES)
    for mode in settings.modes:
        if mode not in modes:
            raise DemixError(
                f"unknown mode {mode!r}{suggest(mode, modes)} (modes: {', '.join(modes)})"
            )
    for rate in set(settings.switch_rates) - {"dev"}:
        try:
            number = float(rate)
        except ValueError:
            raise DemixError(f"switch rate {rate!r}: use a number or 'dev'") from None
        check_switch_rate(number)
    index, count = settings.shard
    if not 0 <= index < count:
        raise DemixError(f"shard {index}/{count}: use i/n with 0 <= i < n")


def _open(
    runs: Sequence[Run], settings: Settings, data_dir: str
) -> tuple[list[Evaluator], list[tuple[Evaluator, str]]]:
    """Opens the runs, pairs each with all its domains, and checks that all can be done."""
    evaluators = []
    names = short_names(str(run.workdir) for run in runs)
    for run in runs:
        evaluator = Evaluator(
            run,
            PreparedData(data_dir or run.config.data.dir),
            batch_size=settings.batch_size,
            prior_sequences=settings.prior_sequences,
            refresh=settings.refresh_priors,
        )
        evaluator.name = names[str(run.workdir)]
        for k in settings.top_k if evaluator.several else ():
            check_top_k(k or None, len(evaluator.checkpoint.experts))
        evaluators.append(evaluator)
    work = [(e, name) for e in evaluators for name in settings.domains or e.known]
    for evaluator, name in work:
        evaluator.data.meta(name)
    return evaluators, work


def _finish(evaluator: Evaluator, text: Text, settings: Settings, results: "Results") -> list[Row]:
    """Evaluates the settings of one text that are not done yet; returns the rows of all."""
    asked = _eval_settings(evaluator, text, settings)
    names = {setting: _hash(evaluator, text, setting) for setting in asked}
    missing = [setting for setting in asked if results.find(names[setting]) is None]
    only_top_k = all(setting.mode == "cached" and setting.top_k for setting in missing)
    for setting in missing:
        rows = evaluator.rows(text, setting, only_top_k_experts=only_top_k)
        more = {"cell": names[setting], "order": asked.index(setting)}
        results.add(names[setting], [row | more for row in rows])
    mixes = any(setting.mode != KNOWN for setting in missing)
    whole = any(setting.mode != KNOWN and not setting.top_k for setting in asked)
    if (mixes and not only_top_k) or (whole and not results.has_trace(evaluator, text)):
        results.trace(evaluator, text)
    return [row for setting in asked for row in results.find(names[setting]) or []]


def _eval_settings(evaluator: Evaluator, text: Text, settings: Settings) -> list[EvalSetting]:
    """Returns every asked setting of a text; a single feed-forward stack has nothing to mix."""
    asked = []
    for name in settings.modes if evaluator.several else (KNOWN,):
        mode = MODES.get(name)
        if mode and mode.takes_switch_rate:
            for rate, top_k in itertools.product(settings.switch_rates, settings.top_k):
                source = "dev" if rate == "dev" else "given"
                asked.append(EvalSetting(name, _rate(evaluator, text, name, rate), top_k, source))
        else:
            asked.append(EvalSetting(name, 1.0 if mode and mode.rule == "average" else None))
    return list(dict.fromkeys(asked))


def _rate(evaluator: Evaluator, text: Text, mode: str, rate: str) -> float:
    if rate != "dev":
        return float(rate)
    prior = evaluator.prior(text.domain)
    return prior.switch_rate if mode == "cached" else prior.uniform_switch_rate


def _hash(evaluator: Evaluator, text: Text, setting: EvalSetting) -> str:
    """Hashes all that decides the rows of a setting."""
    decides = [
        str(evaluator.run.workdir),
        evaluator.checkpoint.params_hash,
        text.domain,
        text.split,
    ]
    decides += [text.fingerprint, repr(setting)]
    if setting.mode == "cached":
        decides.append(repr(evaluator.prior(text.domain).weights))
    return _digest(json.dumps(decides))


class Results:
    """A folder of results, shared by any number of processes.

    Args:
      out: path of the folder.
      runs: hash of the parameters of each run that is evaluated now; rows of others are kept, but
        not collected.
    """

    def __init__(self, out: Path, runs: Mapping[str, str]):
        self.path, self._runs, self._cells = out / "results.json", dict(runs), out / "cells"
        self._traces = out / "traces"
        hashes = set(runs.values())  # those of a run that was moved are still its own
        rows = [row for row in self._rows() if row.get("params_hash") not in hashes]
        if others := {row["run"] for row in rows} - set(runs):
            raise DemixError(
                f"{out} holds results of {', '.join(sorted(others))}, asked for {', '.join(runs)}; "
                "use another --out"
            )
        self._cells.mkdir(parents=True, exist_ok=True)
        for folder in (out, self._cells, self._traces):
            _delete_leftovers(folder)

    def find(self, name: str) -> list[Row] | None:
        """Returns the rows of a setting by its hash; None if it is still to do."""
        path = self._cells / f"{name}.json"
        return _read_cell(path) if path.exists() else None

    def add(self, name: str, rows: Sequence[Row]) -> None:
        """Writes the rows of a setting, whole or not at all."""
        write_whole(self._cells / f"{name}.json", json.dumps(rows))

    def trace(self, evaluator: Evaluator, text: Text) -> None:
        """Keeps the posteriors along some documents."""
        workdir = evaluator.run.workdir
        names = np.array(evaluator.checkpoint.experts)
        arrays = {f"{workdir}|{text.domain}": evaluator.trace(text), f"experts|{workdir}": names}
        with open_whole(self._trace_path(str(workdir), text.domain)) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def has_trace(self, evaluator: Evaluator, text: Text) -> bool:
        """Returns True if the posteriors along documents of a text were kept, and can be read."""
        path = self._trace_path(str(evaluator.run.workdir), text.domain)
        return bool(path.exists() and _read_trace(path))

    def collect(self) -> None:
        """Writes `results.json` and `traces.npz` from what all processes have done so far.

        Rows of other checkpoints, of experts that are no more or have changed, are left out.
        """
        newest: dict[tuple, Row] = {}  # a rate chosen on dev may have moved: it is no key
        keys = ("run", "domain", "split", "mode", "expert", "top_k")
        for row in self._rows():
            if row.get("params_hash") == self._runs.get(row["run"], ""):
                newest[*(row[key] for key in keys), asked_switch_rate(row)] = row
        runs = list(self._runs)
        rows = sorted(newest.values(), key=lambda r: (runs.index(r["run"]), r["order"]))
        values = {"rows": rows, "averages": averages(rows), "warning": lossy_warning(rows)}
        write_json(self.path, seal(values))
        self._collect_traces({self._trace_path(row["run"], row["domain"]) for row in rows})

    def _collect_traces(self, paths: Collection[Path]) -> None:
        traces: dict[str, np.ndarray] = {}
        for path in sorted(path for path in paths if path.exists()):
            traces |= _read_trace(path)
        whole = self.path.with_name("traces.npz")
        if not traces:
            whole.unlink(missing_ok=True)
            return
        with open_whole(whole) as file:
            np.savez_compressed(file, **traces)  # type: ignore[arg-type]

    def _trace_path(self, run: str, domain: str) -> Path:
        return self._traces / f"{_digest(f'{run} {self._runs[run]} {domain}')}.npz"

    def _rows(self) -> list[Row]:
        files = sorted(self._cells.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        rows = (row for file in files for row in _read_cell(file) or ())
        places = {resolve_path(run): run for run in self._runs}
        return [row | {"run": places.get(resolve_path(row["run"]), row["run"])} for row in rows]


def _read_cell(path: Path) -> list[Row] | None:
    """Reads the rows of a setting; None if they are damaged, and to be made anew."""
    with contextlib.suppress(DemixError):
        return read_cell(path)
    return None


def _read_trace(path: Path) -> dict[str, np.ndarray]:
    """Reads the posteriors along documents; {} if they are damaged, and to be made anew."""
    with contextlib.suppress(DemixError):
        return read_arrays(path, "")
    return {}


def _delete_leftovers(folder: Path) -> None:
    """Deletes what killed processes did not write to the end; others may be writing right now."""
    for path in folder.glob(f"*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and time.time() - path.stat().st_mtime > _WRITING:
                path.unlink()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
