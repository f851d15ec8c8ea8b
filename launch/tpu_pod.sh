#!/usr/bin/env bash
# Runs a verb on all hosts of a TPU pod slice, and shows their output until the last has ended.
#
#   NAME=my-pod ZONE=us-central2-b bash launch/tpu_pod.sh demix train --config C --workdir W
#
# NAME   of the TPU VM
# ZONE   where it is
# SETUP  what every host's shell runs first, such as: SETUP='source ~/venv/bin/activate'
# DRY=1  prints the command and runs nothing
#
# Once for each TPU VM, install the package with its `tpu` extra and mount a shared file system
# (Filestore, or a bucket by gcsfuse) in the same place on every host, for --workdir and --data_dir:
#
#   NAME=... ZONE=... bash launch/tpu_pod.sh pip install 'demix_jax[tpu] @ git+https://...'
#
# It stays in the foreground: where the connection may break, start it in tmux. To have a run save and
# end, from another terminal: NAME=... ZONE=... bash launch/tpu_pod.sh pkill -TERM -x demix
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "$0")/flags.sh"
need NAME "the name of the TPU VM (gcloud compute tpus tpu-vm list)"
need ZONE "the zone of the TPU VM, such as ZONE=us-central2-b"
need_command "$@"

remote=${SETUP:+$SETUP && }$(show "LIBTPU_INIT_ARGS=$tpu_flags" "$@")
command=(gcloud compute tpus tpu-vm ssh "$NAME" --worker=all "--zone=$ZONE" "--command=$remote")
if [[ -n ${DRY:-} ]]; then
  show "${command[@]}"
else
  exec "${command[@]}"
fi
