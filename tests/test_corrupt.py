"""The fast part of `python -m torture corrupt`: damage to every kind of file, named or harmless."""

from collections import Counter
from pathlib import Path

import pytest

from torture.corrupt import KINDS, corrupt

pytestmark = pytest.mark.slow


def test_damage_to_any_file_is_named_or_harmless(tmp_path: Path) -> None:
    counts, wrong = corrupt(tmp_path, flips=1, most=1)
    assert not wrong, wrong
    assert {kind for kind, _ in counts} == set(KINDS)
    total = sum(counts.values(), Counter())
    assert total["named"] > 50
    harmless = {
        kind for (kind, how), found in counts.items() if found["harmless"] and how != "flip"
    }
    assert harmless <= {"card beside it", "checkpoint: other files"}
