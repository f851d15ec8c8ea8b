#!/usr/bin/env bash
# What an expert should own, on real text: joint training of every row of `model.expert_owns`, mixed
# in every way, and a trained ffn run that is widened to each row and adapted; docs/ownership.md.
#
#   TEXT=FOLDER OUT=runs/ownership bash bench/ownership_study.sh [prepare|joint|adapt ...]
#
# FOLDER has train/ and novel/, each with one <domain>.jsonl[.gz|.zst] per domain. Stages that are
# done, or the finished parts of one, are not done again.
set -euo pipefail

NEW=${NEW:-acl_papers,contracts,gutenberg,tweets}
STEPS=${STEPS:-700}
TOKENS=${TOKENS:-6000}
SCALES=${SCALES:-10 100}
ROWS=${ROWS:-ffn ffn+embeddings layers all}
RATES=${RATES:-1e-3}
DATA=${DATA:-$OUT/data}
config=(--config configs/quick.py --data_dir "$DATA" --config.data.vocab_size=8192
  --config.train.steps="$STEPS" --config.train.branch_step=$((STEPS * 3 / 10)))
names() { (cd "$TEXT/$1" && for file in *; do echo "${file%%.*}"; done | paste -sd,); }
train=$(names train) novel=$(names novel)
evaluate() { demix evaluate --domains "$train,$novel" --tokens "$TOKENS" "$@"; }

prepare() {
  [ -e "$DATA/data.json" ] || demix prepare "${config[@]}" \
    --config.data.sources="$TEXT/train,$TEXT/novel" --config.data.novel_domains="$novel"
}

joint_train() { # every row from the same dense model, with the same text in the same order
  demix train "${config[@]}" --config.variant=dense_balanced --workdir "$OUT/dense"
  branch=("${config[@]}" --config.train.branch_from="$OUT/dense")
  for scale in $SCALES; do
    demix train "${branch[@]}" --config.model.expert_owns=ffn+bias \
      --config.model.output_bias_scale="$scale" --workdir "$OUT/ffn+bias$scale"
  done
  for row in $ROWS; do
    # The scale is that of the biases which these runs get when they are widened to be adapted.
    demix train "${branch[@]}" --config.model.expert_owns="$row" \
      --config.model.output_bias_scale=100 --workdir "$OUT/$row"
  done
}

joint() {
  joint_train
  [ -e "$OUT/parts" ] ||
    python bench/bias_runs.py --ffn "$OUT/ffn" --bias "$OUT/ffn+bias100" --out "$OUT/parts"
  runs=("$OUT/dense")
  for row in $ROWS; do runs+=("$OUT/$row"); done
  for scale in $SCALES; do runs+=("$OUT/ffn+bias$scale"); done
  runs+=("$OUT/parts/zeroed" "$OUT/parts/common" "$OUT/parts/transplanted")
  evaluate --workdir "$(IFS=,; echo "${runs[*]}")" --out "$OUT/joint" \
    --modes known,average,uniform,updating,cached --switch_rates 0,dev
}

adapt() { # the ffn run, widened, and the dense model, to each new domain
  for rate in $RATES; do
    settings=(--steps 200 --batch_size 8 --validate_every 50 --patience 0 --learning_rate "$rate")
    for row in $ROWS ffn+bias; do
      widened="$OUT/adapted/$rate/$row"
      [ -e "$widened" ] ||
        demix materialize --workdir "$OUT/ffn" --variant demix --expert_owns "$row" --out "$widened"
      demix adapt --workdir "$widened" --domain "$NEW" --out "$widened-new" "${settings[@]}"
    done
    runs=("$OUT/dense")
    for name in ${NEW//,/ }; do
      demix adapt --workdir "$OUT/dense" --domain "$name" --out "$OUT/adapted/$rate/dense-$name" \
        "${settings[@]}"
      runs+=("$OUT/adapted/$rate/dense-$name")
    done
    # What a dense model forgets; experts under a frozen trunk forget nothing, to the last bit.
    demix evaluate --workdir "$(IFS=,; echo "${runs[*]}")" --out "$OUT/adapted/$rate/results" \
      --domains "$train,$NEW" --tokens "$TOKENS" --modes known
  done
}

for stage in "${@:-prepare joint adapt}"; do for part in $stage; do "$part"; done; done
