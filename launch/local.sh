#!/usr/bin/env bash
# Runs a verb on this machine in N processes, each with a GPU of its own if there are GPUs.
#
#   N=4 bash launch/local.sh demix train --config configs/quick.py --workdir runs/a
#
# N      processes; default: one for each GPU, or 2 without any
# PORT   of process 0, where the others find it; default: a free one
# GRACE  seconds that the others get to end when one has died; default 30
# DRY=1  prints the commands and runs nothing
#
# SIGTERM and SIGINT are passed on to all processes; a second one kills them.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "$0")/flags.sh"
need_command "$@"

mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*')
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"; fi
if [[ ${JAX_PLATFORMS:-} == cpu ]]; then gpus=(); fi
default=$((${#gpus[@]} ? ${#gpus[@]} : 2))
N=${N:-$default}
if ((${#gpus[@]} && N > ${#gpus[@]})); then
  refuse "N=$N processes, but ${#gpus[@]} GPUs; set N to ${#gpus[@]} or less"
fi
while [[ -z ${PORT:-} ]]; do # below the ports that systems give to clients
  PORT=$((20000 + RANDOM % 10000))
  if (: <"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then PORT=''; fi
done

set -m # every process leads a group, so that nothing that it has started can outlive it
groups=() running=() filters=() again='' result=0 deadline=0
send() { for i in "${!running[@]}"; do kill -s "$1" "${running[$i]}" 2>/dev/null || true; done; }
trap 'send "${again:-INT}"; again=KILL' INT
trap 'send "${again:-TERM}"; again=KILL' TERM HUP
# shellcheck disable=SC2329 # a trap calls it
finish() {
  for group in "${groups[@]}"; do kill -s KILL -- "-$group" 2>/dev/null || true; done
  wait "${filters[@]}" || true # for the last lines
}
trap finish EXIT

for ((process = 0; process < N; process++)); do
  command=("$@")
  if ((N > 1)); then
    command+=("--coordinator=127.0.0.1:$PORT" "--num_processes=$N" "--process_id=$process")
  fi
  if ((${#gpus[@]})); then command=("XLA_FLAGS=$gpu_flags" "${command[@]}"); fi
  if ((${#gpus[@]} && N > 1)); then command=("CUDA_VISIBLE_DEVICES=${gpus[$process]}" "${command[@]}"); fi
  if [[ -n ${DRY:-} ]]; then
    show "${command[@]}"
    continue
  fi
  number=$( ((N == 1)) || echo "[$process] ")
  exec {output}> >(trap '' INT TERM HUP && exec sed -u "s/^/$number/")
  filters+=($!)
  env "${command[@]}" </dev/null >&"$output" 2>&1 &
  running[process]=$!
  groups+=($!)
  exec {output}>&-
done

while ((${#running[@]})); do
  for i in "${!running[@]}"; do
    kill -0 "${running[$i]}" 2>/dev/null && continue
    status=0
    wait "${running[$i]}" 2>/dev/null || status=$?
    unset "running[$i]"
    if ((status && !deadline)); then
      name=$( ((status <= 128 || status > 192)) || echo " (SIG$(kill -l "$status"))")
      echo "process $i of $N ended with status $status$name" >&2
      result=$((result ? result : status))
    fi
  done
  if ((result && !deadline)); then
    send TERM
    deadline=$((SECONDS + 1 + ${GRACE:-30}))
  elif ((deadline && SECONDS >= deadline)); then
    echo "killed after ${GRACE:-30} s: process ${!running[*]}" >&2
    send KILL
    deadline=$((SECONDS + 60))
  fi
  { sleep 0.2 & wait $! || true; } 2>/dev/null # a signal ends it
done
exit "$result"
