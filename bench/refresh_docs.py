"""Puts the tables of a run of the main job into README.md and docs/quickstart.md.

    make run 2>&1 | tee run.log && python bench/refresh_docs.py run.log

Numbers in prose are changed by hand; the lines that they come from are printed.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/quickstart.md")
TABLES = ("known domain", "macro average, nats/token", "demix: expert x domain",
          "before and after, nats/token", "removed ")  # fmt: skip
NEXT = ("== ", "nats/token ", "bits/byte ", "results: ")  # begin what follows a table
LAST = re.compile(r"\d+ of \d+ scores|receipt:")  # lines that end a table without an empty one


def tables(log: str) -> dict[str, str]:
    """Returns the first table of each kind that the log has, by its beginning."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in re.sub(r"/\S*/(?=runs/quick)", "", log).splitlines():
        start = next((start for start in TABLES if line.startswith(start)), None)
        if start and start not in found:
            lines = found[start] = []
        elif not line.strip() or line.startswith(NEXT):
            lines = None
        if lines is not None:
            lines.append(line.rstrip())
            lines = None if LAST.match(line) else lines
    return {start: "\n".join(lines) for start, lines in found.items()}


def refresh(text: str, found: dict[str, str]) -> str:
    """Returns a document whose code blocks have these tables in place of older ones."""
    blocks = text.split("```")
    for i in range(1, len(blocks), 2):
        parts = blocks[i].split("\n\n")
        for j, part in enumerate(parts):
            body = part.strip("\n")
            for start in TABLES:
                if start in found and body.startswith(start):
                    parts[j] = part.replace(body, found[start])
        blocks[i] = "\n\n".join(parts)
    return "```".join(blocks)


def main(log: Path) -> None:
    """Rewrites the documents, and prints the lines with the numbers of the prose."""
    text = log.read_text()
    found = tables(text)
    if missing := set(TABLES) - set(found):
        raise SystemExit(f"{log} has no table that begins with: {', '.join(sorted(missing))}")
    for name in DOCUMENTS:
        document = ROOT / name
        document.write_text(refresh(document.read_text(), found))
    print("in prose, by hand:")
    for line in [*found[TABLES[1]].splitlines(), *found[TABLES[3]].splitlines()]:
        print(f"  {line}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
