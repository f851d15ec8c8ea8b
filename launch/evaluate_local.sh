#!/usr/bin/env bash
# Evaluates on this machine with N processes that share one results folder.
#
#   N=4 bash launch/evaluate_local.sh --workdir runs/a,runs/b --out runs/results --modes known,uniform
#
# DRY=1 prints the commands instead. On a machine with several accelerators, process i gets device i.
set -euo pipefail

N=${N:-2}
pids=()
for ((i = 0; i < N; i++)); do
  command=(demix evaluate --shard "$i/$N" "$@")
  if [[ -n ${DRY:-} ]]; then
    echo "CUDA_VISIBLE_DEVICES=$i ${command[*]}"
  else
    CUDA_VISIBLE_DEVICES=$i "${command[@]}" >"/tmp/demix_evaluate_$$_$i.log" 2>&1 &
    pids+=($!)
  fi
done
[[ -n ${DRY:-} ]] && exit 0

failed=0
for i in "${!pids[@]}"; do
  if ! wait "${pids[$i]}"; then
    failed=1
    echo "process $i of $N failed; the end of its output:" >&2
    tail -n 5 "/tmp/demix_evaluate_$$_$i.log" >&2
  fi
  rm -f "/tmp/demix_evaluate_$$_$i.log"
done
[[ $failed == 0 ]] || exit 1
demix evaluate "$@" # everything is done: collects and prints
