#!/usr/bin/env bash
# Adding, removing and merging experts on real text: what docs/adaptation.md says.
#
#   TEXT=FOLDER OUT=runs/adaptation bash bench/adaptation_study.sh
#
# FOLDER has train/ and novel/, each with one <domain>.jsonl[.gz|.zst] per domain. NEW are the novel
# domains to adapt to; GONE is the training domain to remove.
set -euo pipefail

NEW=${NEW:-acl_papers,contracts,gutenberg,tweets}
GONE=${GONE:-legal}
STEPS=${STEPS:-700}
TOKENS=${TOKENS:-12000}
DATA=${DATA:-$OUT/data}
config=(--config configs/quick.py --data_dir "$DATA" --config.data.vocab_size=8192
  --config.train.steps="$STEPS" --config.train.branch_step=$((STEPS * 3 / 10)))
adapt=(--steps 200 --batch_size 8 --validate_every 20 --patience 3)
train=$(cd "$TEXT/train" && for file in *; do echo "${file%%.*}"; done | paste -sd,)
others=$(echo "$train" | tr , '\n' | grep -vx "$GONE" | paste -sd,)
read_text=(--tokens "$TOKENS" --modes known,uniform,cached)

if [ ! -e "$DATA/data.json" ]; then
  demix prepare "${config[@]}" --config.data.sources="$TEXT/train,$TEXT/novel" \
    --config.data.novel_domains="$(cd "$TEXT/novel" && for f in *; do echo "${f%%.*}"; done | paste -sd,)"
fi
demix train "${config[@]}" --config.variant=dense_balanced --workdir "$OUT/dense"
demix train "${config[@]}" --config.train.branch_from="$OUT/dense" --workdir "$OUT/demix"
demix evaluate --workdir "$OUT/dense,$OUT/demix" --out "$OUT/before" --domains "$train,$NEW" "${read_text[@]}"

echo "== merged: one expert by each new domain's posterior, and by equal weights, as a dense model"
[ -e "$OUT/merging" ] || demix materialize --workdir "$OUT/demix" --variant demix --out "$OUT/merging"
merged=()
for name in ${NEW//,/ } equal; do
  merged+=("$OUT/merged_$name")
  [ -e "$OUT/merged_$name" ] && continue
  if [ "$name" = equal ]; then weights=(--weights uniform); else weights=(--weights posterior --domain "$name"); fi
  demix experts merge --workdir "$OUT/merging" "${weights[@]}" --to "m_$name"
  demix materialize --workdir "$OUT/merging" --expert "m_$name" --out "$OUT/merged_$name"
  demix experts remove --workdir "$OUT/merging" --name "m_$name" --noscan
done
demix evaluate --workdir "$(IFS=,; echo "${merged[*]}")" --out "$OUT/merged" --domains "$train,$NEW" \
  --tokens "$TOKENS" --modes known

echo "== removed: $GONE, against models that never saw it"
if [ ! -e "$OUT/without_$GONE" ]; then
  demix materialize --workdir "$OUT/demix" --variant demix --out "$OUT/without_$GONE"
  demix experts remove --workdir "$OUT/without_$GONE" --name "$GONE"
fi
demix train "${config[@]}" --config.data.train_domains="$others" --config.variant=dense_balanced \
  --workdir "$OUT/never_dense"
demix train "${config[@]}" --config.data.train_domains="$others" \
  --config.train.branch_from="$OUT/never_dense" --workdir "$OUT/never"
demix evaluate --workdir "$OUT/demix,$OUT/without_$GONE,$OUT/never,$OUT/never_dense" --out "$OUT/removed" \
  --domains "$train" "${read_text[@]}"

echo "== adapted: an expert for each new domain, and a dense model for each"
dense=()
for name in ${NEW//,/ }; do
  demix adapt --workdir "$OUT/dense" --domain "$name" --out "$OUT/dense_$name" "${adapt[@]}"
  dense+=("$OUT/dense_$name")
done
demix adapt --workdir "$OUT/demix" --domain "$NEW" --out "$OUT/adapted" "${adapt[@]}"
demix evaluate --workdir "$OUT/demix,$(IFS=,; echo "${dense[*]}")" --out "$OUT/after" --before "$OUT/before" \
  --domains "$train,$NEW" "${read_text[@]}"
demix report --results "$OUT/before,$OUT/after" --out "$OUT/report"
