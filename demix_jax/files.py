"""Writing of small files, whole or not at all."""

import json
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # ends the name of a file that is not whole yet


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file atomically, one value a line."""
    write_whole(path, json.dumps(values, indent=1) + "\n")
