#!/usr/bin/env bash
# Evaluates on several single-host TPU VMs that mount the same folder (Filestore or gcsfuse).
#
#   VMS="tpu-a tpu-b" ZONE=us-central1-a bash launch/evaluate_tpu.sh --workdir RUNS --out FOLDER
#
# DRY=1 prints the commands. Each VM needs this package installed with its `tpu` extra.
set -euo pipefail

read -ra vms <<<"${VMS:?names of TPU VMs}"
for i in "${!vms[@]}"; do
  remote=$(printf '%q ' demix evaluate --shard "$i/${#vms[@]}" "$@")
  command=(gcloud compute tpus tpu-vm ssh "${vms[$i]}" --zone="${ZONE:?}" --command="$remote")
  if [[ -n ${DRY:-} ]]; then
    echo "${command[*]}"
  else
    "${command[@]}" &
  fi
done
wait
