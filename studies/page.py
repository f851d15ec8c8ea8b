"""The page: claims first, then every study, and how all of it was made."""

import collections
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from demix_jax.files import write_whole
from studies.grid import STUDIES, grid, studies_of
from studies.page_parts import Claim, Verdict, table
from studies.plots import draw, pictures
from studies.results import ROOT, STORED, Results
from studies.scales import PAPER, SCALES, Scale, Size

PAGE = ROOT / "docs" / "replication.md"
README = ROOT / "README.md"
MARK, END = "<!-- replication -->\n", "<!-- end -->"
NOTE = """Losses are nats per token of test text; lower is better. A difference is taken within a
seed, between models that saw the same tokens in the same order for as many updates, each at the
learning rate that its own sweep chose unless its table names another. ± is the standard error of
the mean over seeds; a single seed has none. The test text is the same for all seeds.

A seed gives the same bits with the same code on the same kind of processor. Where either rounds
differently, models this small, trained this fast, end elsewhere by as much as seeds differ. With
three seeds of `small`, at rates that the sweep of one had chosen, a training of everything again
changed verdicts (this page in revisions 760690e and 19a0808). So there are five seeds now, a number
that was fixed before their results were read, and the sweeps of `small` go by the mean of three.

*Reproduced*: **yes** where every number of the claim lies on the claimed side with 95 % of
Student's t, **partly** where some do, **no** where none does and one lies on the other side with
95 %, and **within the noise of seeds** where none is clear, whatever their signs. Of one seed
nothing is clear: the table says on which side its numbers lie. **Not testable**: what the claim
speaks of did not happen. "No difference" means within 0.05.
Claims marked *(ours)* go beyond the paper."""
PHRASES: dict[Verdict, str] = {
    "yes": "hold",
    "partly": "hold in part",
    "within the noise of seeds": "lie within the noise of seeds",
    "no": "fail",
    "one seed: as claimed": "are as claimed, by one seed",
    "one seed: partly": "are in part, by one seed",
    "one seed: not as claimed": "are not as claimed, by one seed",
    "not testable": "could not be tested",
    "not run": "were not run",
}


def write_page(results: Results, folder: Path) -> Path:
    """Writes page, pictures and stored results into a folder such as docs/; returns the page."""
    stored = folder / STORED.name
    shutil.rmtree(stored, ignore_errors=True)
    results.store(stored)
    drawn = 0
    for scale, found in scales_with_results(results):
        drawn += draw(found, scale, folder / "images")
    path = folder / PAGE.name
    write_whole(path, page(results))
    print(f"wrote {path}, {stored} and {drawn} pictures in {folder / 'images'}")
    return path


def publish(results: Results) -> None:
    """Writes the page into docs/, and its headline into the README.

    Stored results of cells that are not among these stay: machines may publish in turn.
    """
    results = Results.read_stored().updated(results)
    write_page(results, PAGE.parent)
    write_whole(README, with_headline(README.read_text(), results))


def with_headline(text: str, results: Results) -> str:
    """Replaces what stands between the README's marks by the headline."""
    before, found, rest = text.partition(MARK)
    return f"{before}{found}{headline(results)}\n{END}{rest.partition(END)[2]}" if found else text


def scales_with_results(
    results: Results, scales: Sequence[Scale] = tuple(SCALES.values())
) -> list[tuple[Scale, Results]]:
    """Returns each scale of which something was trained, with its cells."""
    found = []
    for scale in scales:
        own = results.only(scale.name, *(size.name for size in scale.sizes))
        if any(".train." in name for name in own.records):
            planned = results.only(PAPER)
            found.append((scale, Results({**own.records, **planned.records})))
    return found


def headline(results: Results) -> str:
    """Counts the claims of every size that was run, and names those that hold or fail."""
    lines = []
    for _, found in scales_with_results(results):
        for size in _sizes_run(found):
            claims = list(_claims(found, size))
            seeds = f"{len(size.seeds)} seed{'s' * (len(size.seeds) > 1)}"
            count = collections.Counter(claim.verdict for claim in claims)
            counted = ", ".join(f"{count[v]} {said}" for v, said in PHRASES.items() if count[v])
            lines.append(
                f"- `{size.name}` ({size.layers} x {size.width}, {seeds}): of {len(claims)} claims "
                f"{counted}."
            )
            for said, wanted in (("Holds", "yes"), ("Fails", "no")):
                lines += [
                    f"  - {said}: {c.claim} ({c.ours})." for c in claims if c.verdict == wanted
                ]
    return "\n".join(lines) or "- nothing was run yet"


def _sizes_run(results: Results) -> list[Size]:
    sizes = [size for scale in SCALES.values() for size in scale.sizes]
    return [size for size in sizes if results.find(f"{size.name}.train.*")]


def page(results: Results) -> str:
    """Writes the whole page in Markdown."""
    parts = ["# The paper's claims on real text", _scales_run(results), _reproduce()]
    found = scales_with_results(results)
    parts += [NOTE, "## Claims"]
    parts += [_claim_table(own, scale) for scale, own in found]
    for scale, own in found:
        parts += [_setting(own, scale)]
        for study in STUDIES:
            text = study.section(own, scale)
            if "\n" in text:  # more than its title
                parts.append(text)
            name = study.__name__.rpartition(".")[2]
            for file, title, *_ in pictures(own, scale):
                if file.endswith(f"-{name}.png"):
                    parts.append(f"![{title}](images/{file})")
    ran = [scale for scale, _ in found]
    for scale in SCALES.values():
        if scale not in ran and f"{scale.name}.prepare" in results.records:
            parts += [_setting(results.only(scale.name), scale, what="what is planned")]
    parts += ["## How it was made", *_made(results)]
    return "\n\n".join(parts) + "\n"


def _scales_run(results: Results) -> str:
    run = [scale.name for scale, _ in scales_with_results(results)]
    left = [name for name in SCALES if name not in run]
    ours = " and ".join(f"`{name}`" for name in run) or "nothing"
    others = "".join(f"; `{name}` was not run" for name in left)
    planned = " `paper` is planned, not run." if results.only(PAPER).records else ""
    some = {size.name for size in _sizes_run(results)}
    lost = [size.name for n in run for size in SCALES[n].sizes if size.name not in some]
    sizes = f", and of its sizes not {', '.join(f'`{name}`' for name in lost)}" if lost else ""
    tiny = "Models are tiny: what holds here may not hold at size."
    return f"**Only {ours} was run{sizes}{others}.**{planned} {tiny}"


def _reproduce() -> str:
    return """```
python launch/replicate.py --data_dir DIR --scale cpu --out OUT
python launch/replicate.py --out OUT --report --publish      this page from the results
```

`DIR` has train/ and novel/ with a `<domain>.jsonl.zst` of `text` and `split` for each domain.
`--list` shows all cells; any of them, in any order, on any machine: `--cells NAMES`, `--only
PATTERN`, in pieces of `--minutes 10`. The results behind every number:
[replication/](replication/)."""


def _claims(results: Results, size: Size) -> Iterator[Claim]:
    for study in studies_of(size):
        yield from study.claims(results, size)


def _claim_table(results: Results, scale: Scale) -> str:
    by_size = {size.name: {c.claim: c for c in _claims(results, size)} for size in scale.sizes}
    run = [name for name in by_size if results.find(f"{name}.train.*")]
    order = dict.fromkeys(claim for claims in by_size.values() for claim in claims)
    columns = [(f"{name}: measured", "reproduced") if name in run else (name,) for name in by_size]
    others = [name for name in (*SCALES, PAPER) if name != scale.name]
    rows = []
    for claim in order:
        expected = next(c[claim].expected for c in by_size.values() if claim in c)
        cells = [
            _cells(claims.get(claim)) if name in run else ["not run"]
            for name, claims in by_size.items()
        ]
        rows.append([claim, expected, *sum(cells, []), *["not run"] * len(others)])
    header = ["claim", "expected", *(title for column in columns for title in column), *others]
    return "\n\n".join((table(header, rows), *_explained(by_size)))


def _explained(by_size: Mapping[str, Mapping[str, Claim]]) -> Iterator[str]:
    """Yields what was tried to explain the claims that do not hold, once for each explanation."""
    found: dict[str, list[str]] = {}
    for name, claims in by_size.items():
        for claim in claims.values():
            if claim.tested and claim.verdict not in ("yes", "not run"):
                found.setdefault(claim.tested, []).append(f"*{claim.claim}* ({name})")
    if found:
        yield "What was tested to explain claims that do not hold, or not clearly:"
        yield "\n".join(f"- {'; '.join(claims)}: {tested}." for tested, claims in found.items())


def _cells(claim: Claim | None) -> list[str]:
    not_run: Verdict = "not run"
    return [claim.ours, f"**{claim.verdict}**"] if claim else ["-", not_run]


def _setting(results: Results, scale: Scale, what: str = "what was trained") -> str:
    prepared = results.prepared
    rows = []
    for size in scale.sizes:
        tokens = size.steps * size.batch * scale.context
        passes = [tokens / prepared["tokens"][name]["train"] for name in prepared["train"]]
        rows.append(
            (size.name, f"{size.layers} x {size.width}", f"{size.steps:,}",
             f"{tokens * len(passes):,}", f"{min(passes):.2g} to {max(passes):.2g}",
             f"{size.adapt_steps} x {size.adapt_batch * scale.context:,}", str(len(size.seeds)))
        )  # fmt: skip
    heldout = min(prepared["tokens"][name]["test"] for name in prepared["tokens"])
    read = scale.test_tokens
    return "\n\n".join(
        (
            f"## Scale `{scale.name}`: {what}",
            f"{len(prepared['train'])} training and {len(prepared['novel'])} novel domains; "
            f"vocabulary of {scale.vocab_size:,}, context {scale.context}; at least "
            f"{min(read, heldout):,} test tokens of each domain are read (whole documents), cached "
            f"priors come from {scale.prior_sequences} validation sequences. Experts branch after "
            f"{scale.branch_share:.0%} of the updates unless it says otherwise.",
            table(
                ("size", "layers x width", "updates", "training tokens", "passes over the text",
                 "adaptation: updates x tokens", "seeds"),
                rows,
            ),
        )
    )  # fmt: skip


def _made(results: Results) -> Iterator[str]:
    rows = []
    for scale in (*SCALES.values(), None):
        for first, names in _by_size(scale).items():
            done = results.only(first).records
            if done:
                records = done.values()
                rows.append(
                    (first, f"{len(done)} of {len(names)}",
                     f"{sum(r.seconds for r in records) / 3600:.2f}",
                     _all(r.machine for r in records), _all(r.versions for r in records),
                     _all(r.date for r in records), _all(r.revision for r in records))
                )  # fmt: skip
    yield table(("cells", "run", "hours", "machine", "versions", "date", "revision"), rows)
    yield (
        "Hours are those of the cells, on a machine that did other work too. Cells that were not "
        "run are shown above as not run, or are missing from their tables; no seed was left out."
    )


def _by_size(scale: Scale | None) -> dict[str, list[str]]:
    cells: dict[str, list[str]] = {}
    for name in grid(scale):
        cells.setdefault(name.split(".")[0], []).append(name)
    return cells


def _all(texts: Iterator[str]) -> str:
    return ", ".join(sorted(set(texts)))
