"""What an imported model gains from experts, frozen trunk or not, against one dense model.

    python -m bench.import_study --data_dir DIR --out runs/import_study [--seeds 3] [--docs]

DIR has train/ and novel/ with <domain>.jsonl.zst, lines of `text` and `split`. A GPT-2-shaped model
is trained on general text, exported as a Hugging Face folder, and imported twice: with an expert
for each of four kinds of text that it has not seen, and dense. All variants then read the same
sequences of the four kinds in the same order, in as many updates. What is done is not done again,
whole runs or parts of one. With `--docs` the tables go into docs/benchmarks.md.
"""

import argparse
import dataclasses
import json
import random
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import measure
from demix_jax.checkpoint.metrics_log import read_metrics
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.sources.base import SPLITS, BadRecords, Document
from demix_jax.data.sources.text_files import TextFiles
from demix_jax.evaluation.evaluate import evaluate
from demix_jax.evaluation.settings import Settings
from demix_jax.experts.lifecycle import add_experts
from demix_jax.experts.materialize import materialize
from demix_jax.files import write_whole
from demix_jax.interop.export_model import export_model
from demix_jax.interop.import_model import import_model
from demix_jax.model.params import count, param_shapes
from demix_jax.training.train import train

GENERAL = ("realnews", "reddit", "reviews", "web")
KINDS = ("cs", "legal", "med", "github")
STACK = "general"  # name of an expert that is the imported feed-forward stack as it was
FROZEN, TRAINED, ONE = "experts, trunk frozen", "experts, trunk trained", "one dense model"
VARIANTS = {FROZEN: "frozen", TRAINED: "trained", ONE: "dense"}


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape and length of everything.

    Attributes:
      model: shape of the model.
      vocab_size: pieces of the tokenizer, trained on the general text.
      general_steps: updates on general text.
      general_batch_size: sequences of each domain in one of these.
      steps: updates on the four kinds.
      batch_size: sequences of each domain in one of these.
      general_rate: learning rate on general text.
      rates: learning rates that each variant is tried with; while the best is the first or the
        last, another one beyond it is tried.
      bytes: bytes of text of each domain for training, general and of the four kinds.
      heldout_bytes: bytes of text of each domain for validation, and for test.
      tokens: test tokens that are read of each domain, rounded up to whole documents.
    """

    model: ModelConfig
    vocab_size: int = 4096
    general_steps: int = 800
    general_batch_size: int = 8
    steps: int = 100
    batch_size: int = 4
    general_rate: float = 2e-3
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    bytes: tuple[int, int] = (4_000_000, 1_500_000)
    heldout_bytes: int = 200_000
    tokens: int = 12_000


FULL = Size(ModelConfig(layers=4, width=128, heads=4, context=128, scan_unroll=4))


class Study:
    """All cells of the study; each is a call that the command line has too, and is done once.

    Args:
      data_dir: folder with train/ and novel/.
      out: folder of everything that is made.
      size: shape and length of everything.
    """

    def __init__(self, data_dir: Path, out: Path, size: Size = FULL):
        self.data_dir, self.out, self.size = data_dir, out, size
        self.experts, self.dense = out / "imported-demix", out / "imported-dense"

    def run(self, seeds: int) -> list[measure.Row]:
        """Does what is left to do; returns the rows of the table."""
        self.make_base()
        chosen = {variant: self.best_rate(variant) for variant in VARIANTS}
        for variant, rate in chosen.items():
            for seed in range(seeds):
                self.train(variant, rate, seed)
        return self.rows(chosen, seeds)

    def make_base(self) -> None:
        """Trains the general model, exports and imports it, and prepares the four kinds."""
        text, size = self.out / "text", self.size
        for domain in (*GENERAL, *KINDS):
            self._cut(domain, text / f"{domain}.jsonl", size.bytes[domain in KINDS])
        config = Config(
            variant="dense_balanced",
            model=size.model,
            data=DataConfig(
                dir=str(self.out / "data-general"),
                sources=tuple(f"{name}={text / name}.jsonl" for name in GENERAL),
                train_domains=GENERAL,
                vocab_size=size.vocab_size,
            ),
            optim=OptimConfig(learning_rate=size.general_rate, clip=1.0),
            train=self._train_config(size.general_steps, size.general_batch_size),
        )
        if not (self.out / "data-general" / "data.json").exists():
            prepare(config, workers=1)
        train(config, self.out / "general")
        if not (self.out / "model").exists():
            export_model(self.out / "general", self.out / "model")
        if not self.experts.exists():
            import_model(self.out / "model", self.experts, variant="demix", experts=KINDS)
        if not self.dense.exists():
            import_model(self.out / "model", self.dense)
        config.data = DataConfig(
            dir=str(self.out / "data"),
            sources=tuple(f"{name}={text / name}.jsonl" for name in (*KINDS, *GENERAL)),
            train_domains=KINDS,
            novel_domains=GENERAL,
            tokenizer=str(self.experts),
        )
        if not (self.out / "data" / "data.json").exists():
            prepare(config, workers=1)

    def train(self, variant: str, rate: float, seed: int) -> Path:
        """Trains one variant on the four kinds; returns the folder of the run."""
        base = self.dense if variant == ONE else self.experts
        config, found = load_run(base).config, load_run(self.out / "general").config
        config.model.scan_unroll = self.size.model.scan_unroll
        config.data.dir, config.data.train_domains = str(self.out / "data"), KINDS
        config.optim = dataclasses.replace(found.optim, learning_rate=rate)
        config.train = dataclasses.replace(
            self._train_config(self.size.steps, self.size.batch_size),
            init_from=str(base),
            freeze="shared" if variant == FROZEN else "none",
            seed=seed,
        )
        workdir = self.out / "runs" / f"{VARIANTS[variant]}-{rate:g}-{seed}"
        print(f"== {workdir.name}", flush=True)
        train(config, workdir)
        return workdir

    def best_rate(self, variant: str) -> float:
        """Returns the learning rate with the lowest validation loss of the first seed."""
        losses = {rate: validation(self.train(variant, rate, 0)) for rate in self.size.rates}
        best = min(losses, key=lambda rate: losses[rate])
        while len(losses) > 1 and best in (min(losses), max(losses)):
            step = sorted(losses)[1] / min(losses)
            rate = float(f"{best * step if best == max(losses) else best / step:.6g}")
            losses[rate] = validation(self.train(variant, rate, 0))
            best = min(losses, key=lambda rate: losses[rate])
        return best

    def sweep(self) -> list[measure.Row]:
        """Returns the validation loss of every learning rate that was tried with the first seed."""
        rows = []
        for variant, short in VARIANTS.items():
            found = {
                float(path.name.split("-", 1)[1].rpartition("-")[0]): validation(path)
                for path in (self.out / "runs").glob(f"{short}-*-0")
            }
            losses = {f"{rate:g}": f"{found[rate]:.4f}" for rate in sorted(found)}
            rows.append({"validation, nats/token": variant} | losses)
        rates = sorted({key for row in rows for key in row if key[0].isdigit()}, key=float)
        order = ["validation, nats/token", *rates]
        return [{key: row.get(key) for key in order} for row in rows]

    def rows(self, chosen: dict[str, float], seeds: int) -> list[measure.Row]:
        """Reads the test text with every model; returns the rows of the table."""
        imported = self._read([self.dense], "imported")[0]
        rows = [self._row("imported, not trained further", None, [imported], imported, 0)]
        for variant, rate in chosen.items():
            runs = [self.train(variant, rate, seed) for seed in range(seeds)]
            found = self._read(runs, VARIANTS[variant])
            rows.append(self._row(variant, rate, found, imported, self._trained(variant)))
            if variant == FROZEN:
                wider = [self._with_stack(run) for run in runs]
                found = self._read(wider, "frozen-with-stack")
                name = f"{FROZEN}, and the imported stack as a fifth"
                rows.append(self._row(name, rate, found, imported, self._trained(variant)))
        return rows

    def _row(
        self,
        name: str,
        rate: float | None,
        found: Sequence[dict[str, float]],
        before: dict[str, float],
        trained: int,
    ) -> measure.Row:
        """Returns one row: means over seeds, and standard deviations where there are several."""

        def cell(domains: Sequence[str], start: dict[str, float] | None = None) -> str:
            values = [
                statistics.mean(one[domain] - (start or {}).get(domain, 0) for domain in domains)
                for one in found
            ]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):{'+' if start else ''}.3f}{spread}"

        row: measure.Row = {"test, nats/token": name, "learning rate": rate and f"{rate:g}"}
        row["trained, M"] = f"{trained / 1e6:.2f}"
        row |= {kind: cell([kind]) for kind in KINDS}
        row["mean of the four"] = cell(KINDS)
        row["general text"] = cell(GENERAL)
        row["change there"] = cell(GENERAL, before) if trained else None
        return row

    def _read(self, runs: Sequence[Path], name: str) -> list[dict[str, float]]:
        """Returns nats per token by domain: own expert, else the mixture with uniform prior."""
        settings = Settings(
            domains=(*KINDS, *GENERAL),
            tokens=self.size.tokens,
            modes=("known", "uniform"),
            switch_rates=("0",),
        )
        rows = evaluate(runs, self.out / "results" / name, settings, str(self.out / "data"))
        found: list[dict[str, float]] = [{} for _ in runs]
        names = [str(run.resolve()) for run in runs]
        for row in rows:
            single = load_run(Path(row["run"])).config.variant != "demix"
            if single or row["mode"] == ("known" if row["domain"] in KINDS else "uniform"):
                found[names.index(row["run"])][row["domain"]] = row["nats_per_token"]
        return found

    def _with_stack(self, run: Path) -> Path:
        """Adds the imported feed-forward stack to a copy of a run with a frozen trunk."""
        wider = run.with_name(f"{run.name}-with-stack")
        if not wider.exists():
            materialize(run, (), wider, variant="demix")
        if STACK not in load_run(wider).latest().experts:
            add_experts(wider, [STACK], [f"{self.experts}:{KINDS[0]}"])
        return wider

    def _trained(self, variant: str) -> int:
        model, experts = load_run(self.experts).model, 1 if variant == ONE else len(KINDS)
        shapes = param_shapes(model, experts)
        return count(shapes.experts if variant == FROZEN else shapes)

    def _train_config(self, steps: int, batch_size: int) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_size=batch_size,
            log_every=max(1, steps // 10),
            validate_every=0,
            validate_tokens=self.size.tokens,
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=1,
        )

    def _cut(self, domain: str, path: Path, most: int) -> None:
        """Writes documents of a domain, drawn at random, until each split has its bytes."""
        if path.exists():
            return
        places = (self.data_dir / part / f"{domain}.jsonl.zst" for part in ("train", "novel"))
        source = TextFiles(str(next(place for place in places if place.exists())))
        broken = BadRecords(0)
        documents = [found for part in source.parts() for found in part.documents(broken)]
        random.Random(0).shuffle(documents)
        left = dict.fromkeys(SPLITS, self.size.heldout_bytes) | {"train": most}

        def takes(document: Document) -> bool:
            split = document.split or "train"
            left[split] -= len(document.text.encode())
            return left[split] > 0

        lines = (json.dumps({"text": d.text, "split": d.split}) for d in documents if takes(d))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(f"{line}\n" for line in lines))


def validation(workdir: Path) -> float:
    """Returns the last validation loss of a run, nats per token, averaged over domains."""
    lines = read_metrics(workdir)
    return [line["validation_loss"] for line in lines if "validation_loss" in line][-1]


def main() -> None:
    """Runs the study, prints its tables, and saves them."""
    parser = argparse.ArgumentParser(description=__doc__, prog="import_study")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md again")
    given = parser.parse_args()
    command = f"python -m bench.import_study {shlex.join(sys.argv[1:])}"
    study = Study(given.data_dir, given.out)
    rows = study.run(given.seeds)
    where = measure.environment(command.replace(str(given.data_dir), "DIR"))
    tables = (("import", rows), ("import_rates", study.sweep()))
    results = [measure.Result(suite, found, where) for suite, found in tables]
    measure.publish(results, None if given.docs else given.out)


if __name__ == "__main__":
    main()
