#!/usr/bin/env bash
# The main job: two models on the same tokens from the same warm start, then both on held-out text
# of known and of new domains. Run it again to reuse what is there. RUNS chooses another folder.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/quick}
novel=cython,cuda,comments,datasets
config=(--config configs/quick.py --data_dir "$RUNS/data" --config.data.novel_domains="$novel")
domains=python,tests,docs,stubs,headers,c,dialects,unicode

echo "== 1/5 prepare the text"
demix prepare "${config[@]}"
echo "== 2/5 train the baseline: one feed-forward stack for all domains"
demix train "${config[@]}" --config.variant=dense_balanced --workdir "$RUNS/dense_balanced"
echo "== 3/5 train demix: one feed-forward expert per domain, branched from the baseline"
demix train "${config[@]}" --config.train.branch_from="$RUNS/dense_balanced" --workdir "$RUNS/demix"
echo "== 4/5 evaluate both on held-out text: 8 training domains, and 4 novel ones by mixing experts"
demix evaluate --workdir "$RUNS/dense_balanced,$RUNS/demix" --out "$RUNS/results" \
  --domains "$domains,$novel" --tokens 10000 --modes known,uniform,updating,cached
echo "== 5/5 report"
demix report --results "$RUNS/results" --out "$RUNS/report"
echo "wrote: $RUNS/data $RUNS/dense_balanced $RUNS/demix $RUNS/results $RUNS/report"
