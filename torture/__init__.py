"""Long tests, run by `make torture`: what damaged files, strangers' files and kills can do.

    python -m torture fuzz      mutated inputs for every reader of files
    python -m torture corrupt   damage to every file of a run, its data and its exports
    python -m torture power     loss of power at every moment of a save, an edit, an export
    python -m torture kill      SIGKILL of real commands, which are then repeated
    python -m torture resources no room, no inodes, read-only and slow disks
    python -m torture soak      an hour of training, reading, editing and serving: nothing grows

The fast part of each runs in `make test`. docs/reliability.md has the last results.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent.parent / "tests"))  # edits.py and tiny.py make runs
