"""What a model still says of a domain whose expert was removed, by trunk.

    python -m bench.leak --out runs/leak [--docs]

Beginnings of documents of the embedded corpus, so few that they are read some twenty times, train a
joint run (a trunk of all domains) and one with a clean trunk (`train.trunk_domains`). Each is asked
to go on with the first 32 tokens of training text of one domain, of documents and of sequences as
training cuts them: as trained, with that domain's expert removed, and in a run that never had the
domain. A continuation matches if its first 8 tokens are the text's next 8. With `--docs` the table
goes into docs/benchmarks.md.
"""

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import demix_jax
from bench import measure
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.sources.base import SPLITS, BadRecords, hash_split
from demix_jax.data.sources.resolve import find_domains
from demix_jax.evaluation.evaluate import evaluate
from demix_jax.evaluation.settings import Settings
from demix_jax.experts.lifecycle import remove_experts
from demix_jax.files import write_whole
from demix_jax.training.train import train
from studies.recitation import LENGTH, PREFIX, askable, matched, percent

DOMAINS = ("python", "docs", "legal", "romance")
PUBLIC = ("python", "docs")
GONE = "romance"


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape and length of everything.

    Attributes:
      model: shape of the model.
      vocab_size: pieces of the tokenizer, trained on the public domains.
      steps: updates, the first 30 % of which train the trunk.
      batch_size: sequences of each domain in an update.
      characters: characters of each document, and of all training documents of a domain.
      samples: texts drawn for each document.
    """

    model: ModelConfig
    vocab_size: int = 1024
    steps: int = 400
    batch_size: int = 8
    characters: tuple[int, int] = (400, 12_000)
    samples: int = 4


FULL = Size(ModelConfig(layers=2, width=128, heads=4, context=64, scan_unroll=2))


def write_text(folder: Path, size: Size) -> None:
    """Writes the beginnings of documents of every domain, with their splits."""
    most, total = size.characters
    for name, source in find_domains(DataConfig(train_domains=DOMAINS)).sources.items():
        if name not in DOMAINS or (folder / f"{name}.jsonl").exists():
            continue
        left = dict.fromkeys(SPLITS, total // 4) | {"train": total}
        lines, broken = [], BadRecords(0)
        for document in (d for part in source.parts() for d in part.documents(broken)):
            split, text = document.split or hash_split(document.text), document.text[:most]
            if left[split] > 0 and len(text) == most:
                left[split] -= len(text)
                lines.append(json.dumps({"text": text, "split": split}))
        write_whole(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))


def make_runs(out: Path, size: Size) -> dict[tuple[str, str], Path]:
    """Prepares the text and trains what is not trained yet; returns runs by trunk and state."""
    write_text(out / "text", size)
    config = Config(
        model=size.model,
        data=DataConfig(
            dir=str(out / "data"),
            sources=(str(out / "text"),),
            train_domains=DOMAINS,
            vocab_size=size.vocab_size,
        ),
        optim=OptimConfig(learning_rate=4e-3, clip=1.0),
        train=TrainConfig(
            steps=size.steps,
            batch_size=size.batch_size,
            branch_step=size.steps * 3 // 10,
            trunk_domains=PUBLIC,
            log_every=max(1, size.steps // 10),
            validate_every=0,
            validate_tokens=4096,
        ),
    )
    prepare(config, workers=1)
    rest = tuple(name for name in DOMAINS if name != GONE)
    runs = {}
    for trunk, public in (("joint", ()), ("clean", PUBLIC)):
        for state, domains in (("as trained", DOMAINS), ("never had it", rest)):
            workdir = out / f"{trunk}-{state.split()[0]}"
            train(
                dataclasses.replace(
                    config,
                    data=dataclasses.replace(config.data, train_domains=domains),
                    train=dataclasses.replace(config.train, trunk_domains=public),
                ),
                workdir,
            )
            runs[trunk, state] = workdir
        removed = out / f"{trunk}-removed"
        if not removed.exists():
            shutil.copytree(runs[trunk, "as trained"], removed)
        if GONE in load_run(removed).latest().experts:
            remove_experts(removed, [GONE])
        runs[trunk, "expert removed"] = removed
    return runs


def find_texts(data: PreparedData, domain: str, context: int) -> dict[str, list[np.ndarray]]:
    """Returns documents, sequences as training cuts the text, and such of unseen text."""

    def text(split: str, starts: Iterable[int]) -> list[np.ndarray]:
        tokens = data.tokens(domain, split)
        pieces = (tokens[int(start) : int(start) + PREFIX + LENGTH] for start in starts)
        return askable(data.tokenizer, pieces)

    def cut(split: str) -> range:  # the first token of a sequence is the one before its text
        return range(1, len(data.tokens(domain, split)) - context, context)

    return {
        "documents": text("train", data.index(domain, "train")[:, 0] + 1),
        "sequences": text("train", cut("train")),
        "unseen sequences": text("test", cut("test")),
    }


def table(out: Path, size: Size) -> list[measure.Row]:
    """Returns the rows of the table, one for each trunk and state."""
    runs, data = make_runs(out, size), PreparedData(out / "data")
    texts = find_texts(data, GONE, size.model.context)
    left = tuple(name for name in DOMAINS if name != GONE)
    hashes = [
        load_run(runs["clean", state]).latest().manifest.hashes
        for state in ("expert removed", "never had it")
    ]
    if hashes[0] != hashes[1]:
        raise SystemExit("the clean run after the removal is not the one that never had the domain")
    rows = []
    for (trunk, state), workdir in runs.items():
        lm = demix_jax.load(workdir)
        row: measure.Row = {"trunk": trunk, "run": state}
        for what, ids in texts.items():
            greedy = matched(lm, ids, 0)
            row[f"{what}: greedy, %"] = f"{percent(greedy):.1f}"
            if what == "sequences":
                row["greedy, tokens"] = f"{greedy.mean():.2f}"
                row["sampled, %"] = f"{percent(matched(lm, ids, size.samples)):.1f}"
        found = evaluate([workdir], out / "results" / workdir.name, Settings(domains=left))
        known = [line["nats_per_token"] for line in found if line["mode"] == "known"]
        row["test nats/token of the others"] = f"{sum(known) / len(known):.3f}"
        rows.append(row)
    print(f"of {GONE}: {', '.join(f'{len(ids)} {what}' for what, ids in texts.items())}")
    return rows


def main() -> None:
    """Prints the table, and saves it."""
    parser = argparse.ArgumentParser(description=__doc__, prog="leak")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md again")
    given = parser.parse_args()
    rows = table(given.out, FULL)
    command = f"python -m bench.leak {shlex.join(sys.argv[1:])}"
    result = measure.Result("leak", rows, measure.environment(command))
    measure.publish([result], None if given.docs else given.out)


if __name__ == "__main__":
    main()
