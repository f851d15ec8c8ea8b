#!/usr/bin/env bash
# Runs a verb on GPU nodes of a Slurm cluster, one process for each GPU. Submit it from the root of the
# repository; the working folder must be on a file system that all nodes mount.
#
#   sbatch --nodes=4 launch/slurm.sh demix train --config configs/paper_1300m.py --workdir runs/a
#
# For nodes with 4 GPUs: sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sh ...
# DRY=1 prints the command and runs nothing. Processes find each other by Slurm's variables, with a port
# that JAX derives from the number of the job.
#SBATCH --job-name=demix
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "not in a Slurm job; submit it: sbatch --nodes=N launch/slurm.sh demix ..." >&2
  exit 2
fi
# Slurm runs a copy of this script from another folder, in the folder it was submitted from.
if [[ ! -f launch/flags.sh ]]; then
  echo "no launch/flags.sh in $PWD; submit from the root of the repository" >&2
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=flags.sh
source launch/flags.sh
need_command "$@"

# --label puts the number of a process before its lines. When one fails, Slurm ends the others and says
# which it was; after --requeue (a lost node, preemption) the job continues from its last checkpoint.
command=(srun --kill-on-bad-exit=1 --label "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" "$@")
command=("XLA_FLAGS=$gpu_flags" "${command[@]}")
if [[ -n ${DRY:-} ]]; then
  show "${command[@]}"
else
  exec env "${command[@]}"
fi
