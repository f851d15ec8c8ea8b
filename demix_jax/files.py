"""Small files, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # ends the name of what is not yet whole


def write_whole(path: Path, text: str) -> None:
    """Writes a text file at one stroke; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file for people too, one value a line; see `write_whole`."""
    write_whole(path, json.dumps(values, indent=1) + "\n")
