#!/usr/bin/env bash
# The main job: two models on the same tokens from the same warm start, then both on held-out text.
# Run it again to reuse what is there. RUNS chooses another folder.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/quick}
config=(--config configs/quick.py --data_dir "$RUNS/data")

echo "== 1/4 prepare the text"
demix prepare "${config[@]}"
echo "== 2/4 train the baseline: one feed-forward stack for all domains"
demix train "${config[@]}" --config.variant=dense_balanced --workdir "$RUNS/dense_balanced"
echo "== 3/4 train demix: one feed-forward expert per domain, branched from the baseline"
demix train "${config[@]}" --config.train.branch_from="$RUNS/dense_balanced" --workdir "$RUNS/demix"
echo "== 4/4 evaluate both on held-out text"
demix evaluate --workdir "$RUNS/dense_balanced,$RUNS/demix" --tokens 12000 --out "$RUNS/results"
echo "wrote: $RUNS/data $RUNS/dense_balanced $RUNS/demix $RUNS/results"
