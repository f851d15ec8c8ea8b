#!/usr/bin/env bash
# The main job: two models on the same tokens from the same warm start, then both on held-out text
# of known and of new domains; one new domain gets an expert, one expert is removed. Run it again to
# reuse what is there. RUNS chooses another folder.
set -euo pipefail
if [[ -n ${RUNS:-} && $RUNS != [/~]* ]]; then RUNS=$PWD/$RUNS; fi # before the folder changes
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs/quick}
RUNS=${RUNS/#\~/$HOME}
novel=cython,tests,kern,italian
new=italian gone=legal
config=(--config configs/quick.py --data_dir "$RUNS/data" --config.data.novel_domains="$novel")
domains=python,docs,stubs,cpp,legal,music,romance,slavic

echo "== 1/7 prepare the text"
demix prepare "${config[@]}"
echo "== 2/7 train the baseline: one feed-forward stack for all domains"
demix train "${config[@]}" --config.variant=dense_balanced --workdir "$RUNS/dense_balanced"
echo "== 3/7 train demix: one feed-forward expert per domain, branched from the baseline"
demix train "${config[@]}" --config.train.branch_from="$RUNS/dense_balanced" --workdir "$RUNS/demix"
echo "== 4/7 evaluate both on held-out text: 8 training domains, and 4 novel ones by mixing experts"
demix evaluate --workdir "$RUNS/dense_balanced,$RUNS/demix" --out "$RUNS/results" \
  --domains "$domains,$novel" --tokens 10000 --modes known,uniform,updating,cached
echo "== 5/7 add an expert for $new: a copy of the closest one, trained under the frozen trunk"
# on a copy made of hard links, so that the model above stays as it is
[ -e "$RUNS/extended" ] || demix materialize --workdir "$RUNS/demix" --variant demix --out "$RUNS/extended"
demix adapt --workdir "$RUNS/extended" --domain "$new" --out "$RUNS/adapted_$new" \
  --steps 200 --batch_size 8 --learning_rate 1e-3 --validate_every 20
demix evaluate --workdir "$RUNS/extended" --out "$RUNS/results_extended" --before "$RUNS/results" \
  --domains "$domains,$novel" --tokens 10000 --modes known,uniform,cached
demix experts list --workdir "$RUNS/extended"
echo "== 6/7 remove the expert for $gone, with a receipt and a search of all remaining files"
[ -e "$RUNS/reduced" ] || demix materialize --workdir "$RUNS/extended" --variant demix --out "$RUNS/reduced"
if demix experts list --workdir "$RUNS/reduced" | grep -q "^$gone "; then
  demix experts remove --workdir "$RUNS/reduced" --name "$gone"
fi
demix experts verify --workdir "$RUNS/reduced"
echo "== 7/7 report"
demix report --results "$RUNS/results,$RUNS/results_extended" --out "$RUNS/report"
echo "wrote: $RUNS/{data,dense_balanced,demix,extended,reduced,adapted_$new,results,results_extended,report}"
