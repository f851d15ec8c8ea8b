"""Prints docs/licenses.md: the licence that each release in run.txt states in its metadata."""

import re
from importlib import metadata
from pathlib import Path

HEAD = """# Licences of dependencies

demix_jax is under Apache-2.0. These are the licences that the releases pinned in
`requirements/run.txt` state in their own metadata; `make lock` writes the table. None of them comes
with the package: pip installs them.

| package | version | licence |
|---|---|---|"""


def licence(found: metadata.PackageMetadata) -> str:
    """Returns the licence expression of a release, else its classifiers, else its field."""
    if expression := found.get("License-Expression"):
        return expression
    classifiers = [c for c in found.get_all("Classifier") or () if c.startswith("License ::")]
    names = [c.rpartition(" :: ")[2] for c in classifiers if c != "License :: OSI Approved"]
    field = (found.get("License") or "").strip().partition("\n")[0][:60]
    return ", ".join(names) or field or "not stated"


def main() -> None:
    """Prints the table; fails for a release that is not installed."""
    print(HEAD)
    text = Path(__file__).with_name("run.txt").read_text()
    for name, version in re.findall(r"^([\w.-]+)==([^\s\\;]+)", text, re.MULTILINE):
        found = metadata.metadata(name)
        if found["Version"] != version:
            raise SystemExit(f"{name} {found['Version']} is installed, not {version}")
        print(f"| {name} | {version} | {licence(found)} |")


if __name__ == "__main__":
    main()
