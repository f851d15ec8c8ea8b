"""Step time of one process against several on this machine (docs/scale.md).

    python bench/processes.py [--steps 40 --rounds 3]

Trains configs/quick.py from scratch with 8 experts: on one device, on 8 simulated devices of one
process, and of 2 and 4 processes, which exchange gradients by gloo. Runs are interleaved; a run's
speed is the median of what it logs, without the first line. The embedded corpus is prepared once.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

from demix_jax.checkpoint.metrics_log import read_metrics

LAYOUTS = ((1, 1), (1, 8), (2, 4), (4, 2))  # processes, devices of each
FLAGS = ("--config.train.branch_step=0", "--config.train.log_every=10")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_processes"))
    given = parser.parse_args()
    demix = [sys.executable, "-m", "demix_jax"]
    data = [f"--config={Path('configs/quick.py')}", f"--data_dir={given.out / 'data'}"]
    subprocess.run([*demix, "prepare", *data], check=True)
    speeds: dict[tuple[int, int], list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(given.rounds):
        for layout in LAYOUTS:
            workdir = given.out / "x".join(map(str, layout))
            shutil.rmtree(workdir, ignore_errors=True)
            steps = f"--config.train.steps={given.steps}"
            every = f"--config.train.checkpoint_every={given.steps}"
            command = [*demix, "train", *data, *FLAGS, steps, every, f"--workdir={workdir}"]
            speeds[layout].append(_speed(command, workdir, *layout))
    one = statistics.median(speeds[1, 8])
    print(f"{'processes x devices':20} {'tokens/s':>10} {'step time against 1 x 8':>24}")
    for layout, found in speeds.items():
        speed = statistics.median(found)
        print(f"{layout[0]} x {layout[1]:16} {speed:10,.0f} {one / speed:24.2f}")


def _speed(command: list[str], workdir: Path, processes: int, devices: int) -> float:
    """Returns the tokens a second of one run: the median of its lines after the first."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    running = [
        subprocess.Popen(
            [*command, *joined, f"--process_id={i}"], env=environment, stdout=subprocess.DEVNULL
        )
        for i in range(processes)
    ]
    statuses = [process.wait() for process in running]
    if any(statuses):
        sys.exit(f"{' '.join(command)} failed with {processes} processes")
    rows = list(read_metrics(workdir))
    return statistics.median([row["tokens_per_s"] for row in rows if "tokens_per_s" in row][1:])


if __name__ == "__main__":
    main()
