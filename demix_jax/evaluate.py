"""`demix evaluate`: every expert of one or more runs on held-out text of every domain."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from demix_jax.batches import Batch, Prepared, heldout_sequences
from demix_jax.checkpoint import Checkpoint, Checkpoints
from demix_jax.config import MeshConfig
from demix_jax.errors import DemixError
from demix_jax.metrics import Total, macro_nats, micro
from demix_jax.runs import Run, load_run
from demix_jax.score import make_scorer
from demix_jax.sharding import make_mesh, params_sharding, place

Row = dict[str, Any]


class Text(NamedTuple):
    """Held-out text of one domain; `version` changes when the text or how much of it does."""

    domain: str
    split: str
    sequences: Batch
    bytes: int
    version: str


def evaluate(
    workdirs: Sequence[Path],
    out: Path,
    *,
    data_dir: str = "",
    domains: Sequence[str] = (),
    split: str = "test",
    tokens: int = 0,
    batch_size: int = 16,
) -> list[Row]:
    """Scores the newest checkpoint of each run; writes `out/results.json` and prints tables.

    A (checkpoint, text) pair whose rows are already in `results.json` is not scored again.

    Args:
      workdirs: one or more runs.
      out: folder of results, created.
      data_dir: prepared data; "" means what each run was trained on.
      domains: names to evaluate; () means the run's training domains.
      split: train, valid or test.
      tokens: per domain, rounded up to whole documents; 0 means the whole split.
      batch_size: sequences scored at once; changes no result beyond rounding.

    Returns:
      One row per (run, domain, expert).

    Raises:
      DemixError: no run or checkpoint, an unknown domain, or data of another tokenizer.
    """
    results = Results(out / "results.json")
    rows: list[Row] = []
    tables = []
    for workdir in workdirs:
        run = load_run(workdir)
        data = Prepared(data_dir or run.config.data.dir)
        run.check_tokenizer(data)
        texts = [
            _read_text(run, data, name, split=split, tokens=tokens)
            for name in tuple(domains) or run.domains
        ]
        more = _evaluate_run(run, texts, batch_size, results)
        rows += more
        tables.append(matrix_table(run, more))
    results.write()
    print("\n\n".join([*tables, known_table(rows)]))
    print(f"results: {results.path}")
    return rows


class Results:
    """The rows of `results.json`; each belongs to a cell, the hash of all that decides it."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def find(self, cell: str) -> list[Row]:
        """The finished rows of a cell; [] when it is still to do."""
        return [row for row in self._rows if row["cell"] == cell]

    def add(self, rows: Sequence[Row]) -> None:
        """Appends the rows of one cell, replacing those of older checkpoints on the same text."""
        new = {(row["run"], row["domain"], row["split"], row["expert"]) for row in rows}
        self._rows = [
            row
            for row in self._rows
            if (row["run"], row["domain"], row["split"], row["expert"]) not in new
        ]
        self._rows += rows
        self.write()

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        values = {"rows": self._rows, "averages": averages(self._rows)}
        partial.write_text(json.dumps(values, indent=1) + "\n")
        partial.replace(self.path)


def averages(rows: Sequence[Row]) -> list[Row]:
    """Known-domain averages of each run over its training domains, micro and macro named."""
    found = []
    for run in dict.fromkeys(row["run"] for row in rows):
        known = [r for r in rows if r["run"] == run and r["mode"] == "known"]
        if not known:
            continue
        totals = [Total(r["nats"], r["tokens"], r["bytes"]) for r in known]
        pooled, mean = micro(totals), macro_nats(totals)
        found.append(
            {
                "run": run,
                "macro_nats_per_token": mean,
                "macro_perplexity": math.exp(mean),
                "macro_bits_per_byte": sum(t.bits_per_byte for t in totals) / len(totals),
                "micro_nats_per_token": pooled.nats_per_token,
                "micro_perplexity": pooled.perplexity,
                "micro_bits_per_byte": pooled.bits_per_byte,
            }
        )
    return found


def matrix_table(run: Run, rows: Sequence[Row]) -> str:
    """The expert x domain matrix: perplexity, nats/token and bits/byte, best expert starred."""
    experts = list(dict.fromkeys(row["expert"] for row in rows))
    if len(experts) < 2 or run.config.variant == "domain_token":
        return f"{run.workdir} ({run.config.variant}): one feed-forward stack, no expert matrix"
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    cells = {(row["domain"], row["expert"]): row for row in rows}
    lines = [f"{run.workdir} ({run.config.variant}): expert x domain, * is a domain's best expert"]
    for title, key, form in (
        ("perplexity", "perplexity", "9.2f"),
        ("nats/token", "nats_per_token", "9.3f"),
        ("bits/byte", "bits_per_byte", "9.3f"),
    ):
        lines.append(f"{title:18}" + "".join(f"{name[:9]:>11}" for name in domains))
        best = {d: min(experts, key=lambda e, d=d: cells[d, e]["nats"]) for d in domains}  # type: ignore[misc]
        for expert in experts:
            numbers = (
                f" {cells[d, expert][key]:{form}}{'*' if best[d] == expert else ' '}"
                for d in domains
            )
            lines.append(f"  expert {expert[:9]:9}" + "".join(numbers))
    diagonal = sum(best[d] == d for d in domains if d in experts)
    of = sum(d in experts for d in domains)
    lines.append(f"the domain's own expert is the best one for {diagonal} of {of} domains")
    return "\n".join(lines)


def known_table(rows: Sequence[Row]) -> str:
    """Runs side by side: each domain under its known expert, then macro and micro averages."""
    known = [row for row in rows if row["mode"] == "known"]
    runs = list(dict.fromkeys(row["run"] for row in known))
    if not runs:
        return "no training domain was evaluated: no known expert to compare"
    cells = {(row["domain"], row["run"]): row for row in known}
    wide = max(28, *(len(Path(run).name) + 2 for run in runs))
    lines = [
        f"{'known domain':18}" + "".join(f"{Path(run).name:>{wide}}" for run in runs),
        f"{'':18}" + "".join(f"{'ppl  nats/token  bits/byte':>{wide}}" for _ in runs),
    ]
    for domain in dict.fromkeys(row["domain"] for row in known):
        found = (cells.get((domain, run)) for run in runs)
        lines.append(f"{domain:18}" + "".join(f"{_triple(c, ''):>{wide}}" for c in found))
    means = {row["run"]: row for row in averages(rows)}
    for name in ("macro", "micro"):
        found = (means[run] for run in runs)
        text = "".join(f"{_triple(c, name + '_'):>{wide}}" for c in found)
        lines.append(f"{name + ' average':18}" + text)
    return "\n".join(lines)


def _triple(row: Row | None, prefix: str) -> str:
    if row is None:
        return "-"
    names = ("perplexity", "nats_per_token", "bits_per_byte")
    perplexity, nats, bits = (row[prefix + name] for name in names)
    return f"{perplexity:.2f}  {nats:.4f}  {bits:.4f}"


def _read_text(run: Run, data: Prepared, name: str, *, split: str, tokens: int) -> Text:
    """The text of a domain as this run reads it."""
    conditioned = run.config.variant == "domain_token"
    meta = data.meta(name)
    if conditioned and name not in run.domains:
        raise DemixError(
            f"{run.workdir} needs a domain token, and has none for {name!r} "
            f"(domains: {', '.join(run.domains)})"
        )
    prefix = run.prefixes[run.domains.index(name)] if conditioned else None
    context = run.config.model.context
    sequences, size = heldout_sequences(data, name, split, context, tokens, prefix)
    return Text(name, split, sequences, size, f"{meta['splits'][split]['sha256']} {tokens}")


def _evaluate_run(run: Run, texts: Sequence[Text], batch_size: int, results: Results) -> list[Row]:
    checkpoints = Checkpoints(run.workdir)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise DemixError(f"{run.workdir} has no checkpoint yet; continue `demix train`")
        version = json.dumps(checkpoints.meta(steps[-1])["hashes"], sort_keys=True)
        cells = [_digest(f"{version} {text.version}") for text in texts]
        if not all(results.find(cell) for cell in cells):
            evaluator = _Evaluator(run, checkpoints.restore(steps[-1], run.model), batch_size)
    finally:
        checkpoints.close()
    rows: list[Row] = []
    for text, cell in zip(texts, cells, strict=True):
        if not results.find(cell):
            results.add(evaluator.rows(text, cell))
        rows += results.find(cell)
    return rows


class _Evaluator:
    """One checkpoint on its devices, ready to score texts."""

    def __init__(self, run: Run, checkpoint: Checkpoint, batch_size: int):
        self.run, self.step, self.experts = run, checkpoint.step, checkpoint.experts
        mesh = make_mesh(MeshConfig(), len(self.experts))
        sharding = params_sharding(mesh, len(self.experts))
        self.params = place(checkpoint.state.params, sharding)
        self.scorer = make_scorer(run.model, mesh, len(self.experts))
        self.size = math.ceil(batch_size / mesh.shape["data"]) * mesh.shape["data"]

    def rows(self, text: Text, cell: str) -> list[Row]:
        """Every expert on one text; raises DemixError when a log-probability is not finite."""
        start = time.perf_counter()
        nats = np.zeros(len(self.experts))
        starts = range(0, len(text.sequences.tokens), self.size)
        for i in tqdm(starts, f"{self.run.workdir.name} on {text.domain}", disable=None):
            tokens, mask, _ = (leaf[i : i + self.size] for leaf in text.sequences)
            scores = self.scorer(self.params, _pad(tokens, self.size))
            logprobs = np.asarray(scores, np.float64)[:, : len(mask)]
            nats -= np.where(mask, logprobs, 0.0).sum((1, 2))
        seconds = time.perf_counter() - start
        if not np.isfinite(nats).all():
            bad = [e for e, n in zip(self.experts, nats, strict=True) if not math.isfinite(n)]
            raise DemixError(
                f"{self.run.workdir} step {self.step}: log-probabilities of expert "
                f"{', '.join(bad)} on {text.domain!r} are not finite; use another checkpoint"
            )
        count = int(text.sequences.mask.sum())
        common = {
            "run": str(self.run.workdir),
            "variant": self.run.config.variant,
            "checkpoint": self.step,
            "cell": cell,
            "domain": text.domain,
            "split": text.split,
            "seconds": round(seconds, 3),  # all experts together
            "tokens_per_second": round(count / seconds, 1),
        }
        return [
            common | self._numbers(text, expert, Total(float(n), count, text.bytes))
            for expert, n in zip(self.experts, nats, strict=True)
        ]

    def _numbers(self, text: Text, expert: str, total: Total) -> Row:
        own = text.domain if len(self.experts) > 1 else expert
        known = text.domain in self.run.domains and expert == own
        return {
            "mode": "known" if known else "expert",
            "expert": expert,
            **total._asdict(),
            "nats_per_token": total.nats_per_token,
            "perplexity": total.perplexity,
            "bits_per_byte": total.bits_per_byte,
        }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pad(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows)), (0, 0)])
