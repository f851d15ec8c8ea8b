"""The fast part of `python -m torture fuzz`: some mutated inputs for every reader of files."""

import random
from pathlib import Path

import pytest

from torture.fuzz import run_target
from torture.mutations import mutate, mutate_json
from torture.targets import make_targets

pytestmark = pytest.mark.slow
COUNT = 25


def test_no_reader_of_files_raises_anything_but_its_error(tmp_path: Path) -> None:
    targets, read, refused = make_targets(tmp_path), 0, 0
    for name, target in targets.items():
        if "whole report" not in name:  # it draws pictures
            target.path.write_bytes(target.pack(target.seeds[0]))
            outcome = run_target(target, name, 0, COUNT)
            assert not outcome.problem, outcome.problem
            read, refused = read + outcome.read, refused + outcome.refused
            target.path.write_bytes(target.pack(target.seeds[0]))
            target.read()  # as it was
    assert read + refused == COUNT * (len(targets) - 1) > 1000
    assert min(read, refused) > 200  # inputs are neither all broken nor all harmless


def test_inputs_follow_from_their_numbers() -> None:
    seed = b'{"experts": ["law", "med"], "step": 6, "hashes": {"shared": "00"}}'
    one, two = ([mutate(seed, random.Random(i)) for i in range(300)] for _ in range(2))
    assert one == two
    assert len(set(one)) > 250
    changed = [mutate_json(seed, random.Random(i)) for i in range(300)]
    assert sum(b"law" in text for text in changed if text) > 150
