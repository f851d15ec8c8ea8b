"""`launch/replicate.py`: flags to cells to a page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from demix_jax.errors import DemixError
from studies.scales import PAPER, SCALES

ABOUT = """Replicates the paper's claims on a folder of real text: prepares, trains, evaluates,
adapts, removes, reports. Cells that are done are never done again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 2 for a mistake, 3 if time was up."""
    given = _parser().parse_args(arguments)
    try:
        return _run(given)
    except DemixError as error:
        print(f"replicate.py: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    from studies.grid import grid
    from studies.runner import run_cells, select
    from studies.time_needed import estimate_text

    outs = [Path(out) for out in given.out.split(",")]
    if not given.report:
        if len(outs) > 1:
            raise DemixError("several folders in --out are for --report; name one to run cells in")
        cells = grid(SCALES.get(given.scale))
        patterns = [name for name in (given.cells or given.only or "*").split(",") if name]
        chosen = select(cells, patterns)
        place = _place(given, outs[0])
        results = place.results
        if given.list:
            for cell in chosen:
                print(f"{'done' if cell.name in results.records else '    '} {cell.name}")
        left = [cell for cell in chosen if cell.name not in results.records]
        print(estimate_text(left, results), flush=True)
        if given.list:
            return 0
        if left and given.scale != PAPER and not given.data_dir:
            raise DemixError("--data_dir is needed: a folder with train/ and novel/")
        if not run_cells(place, chosen, given.minutes):
            return 3
        if given.cells or given.only:
            return 0
    return _report(outs, publish=given.publish)


def _place(given: argparse.Namespace, out: Path):  # type: ignore[no-untyped-def]
    from studies.cells import Workplace

    scale = SCALES.get(given.scale, SCALES["cpu"])
    data_dir = Path(given.data_dir or ".").expanduser().absolute()
    return Workplace(scale, data_dir, out.expanduser().absolute() / given.scale)


def _report(outs: Sequence[Path], *, publish: bool) -> int:
    from studies import page
    from studies.results import Results

    folders = [out / scale for out in outs for scale in (*SCALES, PAPER)]
    results = Results.read(folders)
    if not results.records:
        raise DemixError(f"no results in {', '.join(map(str, outs))}; run some cells first")
    if publish:
        page.publish(results)
    else:
        page.write_page(results, outs[0] / "report")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replicate.py", description=ABOUT)
    parser.add_argument("--data_dir", help="folder with train/*.jsonl.zst and novel/*.jsonl.zst")
    parser.add_argument("--scale", choices=(*SCALES, PAPER), default="cpu")
    parser.add_argument(
        "--out", required=True, help="folder of all that is made; several to report"
    )
    parser.add_argument("--cells", help="names of cells, comma-separated")
    parser.add_argument("--only", help="patterns of names, such as 'small.*.s0'")
    parser.add_argument("--minutes", type=float, default=0, help="stop, and save, after so long")
    parser.add_argument("--list", action="store_true", help="show the cells and their time")
    parser.add_argument("--report", action="store_true", help="write the page alone")
    parser.add_argument("--publish", action="store_true", help="write the page into docs/")
    return parser
