#!/usr/bin/env bash
# How experts should be mixed, on real text: sweeps of the switch rate and of top k for every prior,
# beside the rule of the paper's released code, on training and novel domains.
#
#   TEXT=FOLDER OUT=runs/study bash bench/mixing_study.sh
#
# FOLDER has train/ and novel/, each with one <domain>.jsonl[.gz|.zst] per domain.
set -euo pipefail

STEPS=${STEPS:-700}
TOKENS=${TOKENS:-12000}
config=(--config configs/quick.py --data_dir "$OUT/data" --config.data.vocab_size=8192
  --config.train.steps="$STEPS" --config.train.branch_step=$((STEPS * 3 / 10)))
novel=$(cd "$TEXT/novel" && for file in *; do echo "${file%%.*}"; done | paste -sd,)
train=$(cd "$TEXT/train" && for file in *; do echo "${file%%.*}"; done | paste -sd,)

demix prepare "${config[@]}" --config.data.sources="$TEXT/train,$TEXT/novel" \
  --config.data.novel_domains="$novel"
demix train "${config[@]}" --config.variant=dense_balanced --workdir "$OUT/dense_balanced"
demix train "${config[@]}" --config.train.branch_from="$OUT/dense_balanced" --workdir "$OUT/demix"
demix evaluate --workdir "$OUT/dense_balanced,$OUT/demix" --out "$OUT/results" \
  --domains "$train,$novel" --tokens "$TOKENS" --top_k 0,1,2,4 \
  --modes known,average,uniform,updating,cached,released_uniform,released_updating,released_cached \
  --switch_rates 0,0.001,0.003,0.01,0.03,0.1,0.3,1,dev
