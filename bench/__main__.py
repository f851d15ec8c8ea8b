"""Runs benchmark suites and writes their tables as JSON and Markdown (docs/benchmarks.md).

    python -m bench --suite train,score,startup,checkpoint,data,generation [--quick] [--out DIR]

A suite is a module of this folder with `run(rounds: int, *, quick: bool = False) -> list[Row]`.
What is compared runs interleaved, A B A B, and medians are kept. A suite writes DIR/SUITE.json.
With `--docs`, DIR is bench/results and the tables of docs/benchmarks.md are made from it again.
`--quick` takes tiny shapes: it proves that the suite runs, its numbers mean nothing.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from bench import measure

SUITES = ("train", "score", "startup", "checkpoint", "data", "generation", "gpu")


def main() -> None:
    """Runs the suites that are named."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", default="train,score", help=f"of {','.join(SUITES)}")
    parser.add_argument("--rounds", type=int, default=0, help="0: as many as the suite takes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md again")
    given = parser.parse_args()
    suites = [name for name in given.suite.split(",") if name]
    if unknown := [name for name in suites if name not in SUITES]:
        parser.error(f"no suite {', '.join(unknown)}; choose from {', '.join(SUITES)}")
    command = f"python -m bench {shlex.join(sys.argv[1:])}"
    for name in suites:
        suite = importlib.import_module(f"bench.{name}")
        options = {"quick": True} if given.quick else {}
        rows = suite.run(given.rounds or (1 if given.quick else 9), **options)
        result = measure.Result(name, rows, measure.environment(command))
        measure.publish([result], None if given.docs else given.out)


if __name__ == "__main__":
    main()
