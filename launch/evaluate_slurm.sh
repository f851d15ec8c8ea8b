#!/usr/bin/env bash
# Evaluates as a Slurm array: one GPU for each task, one results folder on a shared file system.
#
#   sbatch --array=0-7 launch/evaluate_slurm.sh --workdir RUNS --out FOLDER --modes known,uniform
#
# Afterwards, `demix evaluate` with the same flags prints the tables without scoring anything again.
#SBATCH --job-name=demix-evaluate
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

command=(demix evaluate --shard "${SLURM_ARRAY_TASK_ID:?start with sbatch --array=0-N}/${SLURM_ARRAY_TASK_COUNT:?}" "$@")
if [[ -n ${DRY:-} ]]; then
  echo "${command[*]}"
else
  exec srun "${command[@]}"
fi
