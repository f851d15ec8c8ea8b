"""Replicates the paper's claims on a folder of real text; see docs/replication.md.

python launch/replicate.py --data_dir DIR --scale cpu --out runs/replication
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demix_jax.cli.compilation_cache import use_compilation_cache  # noqa: E402
from studies.command import main  # noqa: E402

if __name__ == "__main__":
    use_compilation_cache(None)
    sys.exit(main())
