"""Rounds of work beside a training, in one process until SIGTERM: reading it, or editing copies.

    python -m torture.soak_rounds read FOLDER     evaluate, score and write with the newest step
    python -m torture.soak_rounds edit FOLDER     every edit on a copy; one under the server

A line in FOLDER/read.jsonl or edit.jsonl says what each round has done, or what has failed.
"""

import http.client
import json
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import demix_jax as demix
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.evaluation.evaluate import evaluate
from demix_jax.evaluation.settings import Settings
from demix_jax.experts.lifecycle import (
    add_experts,
    export_experts,
    import_experts,
    merge_experts,
    remove_experts,
    rename_experts,
)
from demix_jax.experts.materialize import materialize
from demix_jax.experts.verify import verify

TEXTS = ["The court held that the statute applies.\n", "def area(r):\n    return 3.14 * r * r\n"]


def read_round(folder: Path, done: Counter) -> None:
    """Evaluates, scores and generates with the newest step of the run that is trained."""
    run, results = folder / "train", folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    settings = Settings(
        tokens=256,
        batch_size=4,
        modes=("known", "uniform", "updating"),
        prior_sequences=8,
        refresh_priors=True,  # those of an older step are refused
    )
    rows = evaluate([run], results, settings)
    assert rows
    assert all(np.isfinite(row["nats"]) for row in rows)
    done["evaluations"] += 1
    lm = demix.load(run)
    assert np.isfinite(lm.perplexity(TEXTS))
    done["scorings"] += 1
    made = lm.generate(TEXTS[0], max_tokens=8, seed=1)
    assert made.generated
    done["generations"] += 1
    with pytest.raises(DemixError, match=r"is being changed by another process \(demix train, "):
        add_experts(run, ["visitor"], [lm.experts[0]])
    done["edits refused during training"] += 1


def edit_round(folder: Path, done: Counter) -> None:
    """Makes every edit on a new copy of the newest step, then one under the server."""
    run = folder / "edited"
    shutil.rmtree(run, ignore_errors=True)
    first, second, *_ = load_run(folder / "train").latest().experts
    materialize(folder / "train", (), run, variant="demix")
    done["copies"] += 1
    exported = folder / "visitor.safetensors"
    edits: list[Callable[[], object]] = [
        lambda: add_experts(run, ["visitor"], [first]),
        lambda: merge_experts(run, "mix", {first: 0.25, second: 0.75}),
        lambda: rename_experts(run, {"mix": "blend"}),
        lambda: export_experts(run, ["visitor"], exported, overwrite=True),
        lambda: remove_experts(run, ["visitor"]),
        lambda: import_experts(run, [exported]),
        lambda: remove_experts(run, ["blend", second]),
        lambda: verify(run),
    ]
    for edit in edits:
        edit()
        done["edits"] += 1
    shutil.rmtree(run)
    if address := re.search(r"http://127\.0\.0\.1:(\d+)", (folder / "serve.log").read_text()):
        _edit_under_server(folder / "served", int(address[1]), first, done)


def _edit_under_server(run: Path, port: int, expert: str, done: Counter) -> None:
    """Adds an expert to the run that is served, has it loaded, asked and unloaded, removes it."""

    def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        connection.request("POST" if body else "GET", path, data if body else None, headers)
        answer = connection.getresponse()
        values = json.loads(answer.read())
        connection.close()
        assert answer.status == 200, values
        done["requests"] += 1
        return dict(values)

    def complete(model: str) -> None:
        fields = {"model": model, "prompt": TEXTS, "max_tokens": 8, "logprobs": 2}
        assert ask("/v1/completions", fields)["choices"]

    complete("demix")
    assert ask("/health")["workdir_differs"] is None
    add_experts(run, ["visitor"], [expert])
    assert "visitor" in ask("/health")["workdir_differs"]
    ask("/v1/experts/load", {"name": "visitor"})
    complete("demix:visitor")
    complete("demix")
    remove_experts(run, ["visitor"])
    assert "visitor" in ask("/health")["workdir_differs"]
    complete("demix:visitor")  # what was loaded is served
    ask("/v1/experts/unload", {"name": "visitor"})
    assert ask("/health")["workdir_differs"] is None
    done["edits under the server"] += 2


def main(name: str, folder: Path) -> None:
    """Goes through rounds until SIGTERM, which ends it after the round that is under way."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    if name == "edit" and not (folder / "served").exists():
        materialize(folder / "train", (), folder / "served", variant="demix")
    work = {"read": read_round, "edit": edit_round}[name]
    while not ended:
        done, failed = Counter(), ""
        try:
            work(folder, done)
        except Exception as error:
            failed = "".join(traceback.format_exception(error)[-3:])
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"done": done, "failed": failed}) + "\n")
        time.sleep(1)
    print("ended after a whole round")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
