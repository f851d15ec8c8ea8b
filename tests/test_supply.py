"""What is installed is pinned and hashed, to the last requirement of a requirement."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent.parent / "requirements"


def pins(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of every release in a file."""
    blocks = re.split(r"\n(?=[\w-])", (FOLDER / name).read_text())
    found = {}
    for block in blocks:
        if match := re.match(r"([\w.-]+)==([^\s\\]+)", block):
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", block)
            found[canonicalize_name(match[1])] = match[2], hashes
    return found


def test_every_release_is_pinned_with_hashes_of_its_files() -> None:
    for path in FOLDER.glob("*.txt"):
        found = pins(path.name)
        assert len(found) > 30
        assert not [name for name, (_, hashes) in found.items() if not hashes], path.name
    assert len(pins("run.txt")["jaxlib"][1]) > 5  # of other platforms and Pythons too


def test_whatever_a_pinned_release_requires_is_pinned() -> None:
    """pip demands it, once one has a hash."""
    found = pins("run.txt") | pins("dev.txt")
    missing = set()
    for name, (version, _) in found.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here")
        assert installed == version, name
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                missing |= {canonicalize_name(requirement.name)} - found.keys()
    assert not missing


def test_licences_and_the_bill_of_materials_are_of_the_pinned_releases() -> None:
    expected = {(name, version) for name, (version, _) in pins("run.txt").items()}
    bill = json.loads((FOLDER / "sbom.json").read_text())["components"]
    assert {(canonicalize_name(c["name"]), c["version"]) for c in bill} == expected
    table = (FOLDER.parent / "docs" / "licenses.md").read_text()
    lines = re.findall(r"^\| ([\w.-]+) \| (\d\S*) \| (.+) \|$", table, re.MULTILINE)
    assert {(canonicalize_name(name), version) for name, version, _ in lines} == expected
    assert all(licence.strip() for _, _, licence in lines)
