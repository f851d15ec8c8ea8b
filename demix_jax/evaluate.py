"""`demix evaluate`: every expert of one or more runs on held-out text of every domain."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from demix_jax.batches import Batch, Prepared, heldout_sequences
from demix_jax.checkpoint import Checkpoint, Checkpoints
from demix_jax.config import MeshConfig
from demix_jax.errors import DemixError
from demix_jax.metrics import Total, macro_nats, micro
from demix_jax.runs import Run, load_run
from demix_jax.score import make_scorer
from demix_jax.sharding import make_mesh, params_sharding

Row = dict[str, Any]


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
    rows: list[Row] = []
    tables = []
    for workdir in workdirs:
        run = load_run(workdir)
        data = Prepared(data_dir or run.config.data.dir)
        run.check_tokenizer(data)
        names = tuple(domains) or run.domains
        for name in names:
            data.meta(name)
        texts = {name: _sequences(run, data, name, split=split, tokens=tokens) for name in names}
        more = _evaluate_run(run, texts, split, batch_size)
        rows += more
        tables.append(matrix_table(run, more))
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "results.json.partial"
    partial.write_text(json.dumps({"rows": rows, "averages": averages(rows)}, indent=1) + "\n")
    partial.replace(out / "results.json")
    print("\n\n".join([*tables, known_table(rows)]))
    print(f"results: {out / 'results.json'}")
    return rows


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
    wide = max(24, *(len(Path(run).name) + 2 for run in runs))
    lines = [
        f"{'known domain':18}" + "".join(f"{Path(run).name:>{wide}}" for run in runs),
        f"{'':18}" + "".join(f"{'ppl  nats/tok  bits/B':>{wide}}" for _ in runs),
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
    return f"{perplexity:.2f}   {nats:.4f}   {bits:.4f}"


def _sequences(
    run: Run, data: Prepared, name: str, *, split: str, tokens: int
) -> tuple[Batch, int]:
    """The text of a domain as this run reads it."""
    known = run.config.variant == "domain_token"
    if known and name not in run.domains:
        raise DemixError(
            f"{run.workdir} needs a domain token, and has none for {name!r} "
            f"(domains: {', '.join(run.domains)})"
        )
    prefix = run.prefixes[run.domains.index(name)] if known else None
    return heldout_sequences(data, name, split, run.config.model.context, tokens, prefix)


def _evaluate_run(
    run: Run, texts: dict[str, tuple[Batch, int]], split: str, batch_size: int
) -> list[Row]:
    checkpoint = _newest(run)
    experts = checkpoint.experts
    mesh = make_mesh(MeshConfig(), len(experts))
    params = jax.device_put(checkpoint.state.params, params_sharding(mesh, len(experts)))
    scorer = make_scorer(run.model, mesh, len(experts))
    size = math.ceil(batch_size / mesh.shape["data"]) * mesh.shape["data"]
    rows = []
    batches = sum(math.ceil(len(batch.tokens) / size) for batch, _ in texts.values())
    with tqdm(
        total=batches, desc=f"evaluate {run.workdir.name}", leave=False, disable=None
    ) as progress:
        for domain, (batch, size_bytes) in texts.items():
            start = time.perf_counter()
            nats = np.zeros(len(experts))
            for i in range(0, len(batch.tokens), size):
                tokens, mask = _pad(batch.tokens[i : i + size], size), batch.mask[i : i + size]
                logprobs = np.asarray(scorer(params, tokens), np.float64)[:, : len(mask)]
                nats -= np.where(mask, logprobs, 0.0).sum((1, 2))
                progress.update()
            seconds = time.perf_counter() - start
            if not np.isfinite(nats).all():
                bad = [e for e, n in zip(experts, nats, strict=True) if not math.isfinite(n)]
                raise DemixError(
                    f"{run.workdir} step {checkpoint.step}: log-probabilities of expert "
                    f"{', '.join(bad)} on {domain!r} are not finite; use another checkpoint"
                )
            totals = [Total(float(n), int(batch.mask.sum()), size_bytes) for n in nats]
            cells = zip(experts, totals, strict=True)
            rows += [
                _row(run, checkpoint, domain, split, expert, total, seconds)
                for expert, total in cells
            ]
    return rows


def _row(
    run: Run, checkpoint: Checkpoint, domain: str, split: str, expert: str, t: Total, seconds: float
) -> Row:
    known = domain in run.domains and expert == (domain if len(checkpoint.experts) > 1 else expert)
    return {
        "run": str(run.workdir),
        "variant": run.config.variant,
        "checkpoint": checkpoint.step,
        "domain": domain,
        "split": split,
        "mode": "known" if known else "expert",
        "expert": expert,
        "tokens": t.tokens,
        "bytes": t.bytes,
        "nats": t.nats,
        "nats_per_token": t.nats_per_token,
        "perplexity": t.perplexity,
        "bits_per_byte": t.bits_per_byte,
        "seconds": round(seconds, 3),  # for all experts together
        "tokens_per_second": round(t.tokens / seconds, 1),
    }


def _newest(run: Run) -> Checkpoint:
    checkpoints = Checkpoints(run.workdir)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise DemixError(f"{run.workdir} has no checkpoint yet; continue `demix train`")
        return checkpoints.restore(steps[-1], run.model)
    finally:
        checkpoints.close()


def _pad(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows)), (0, 0)])
