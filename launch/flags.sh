# shellcheck shell=bash
# Sourced by the launchers: what to tell XLA on GPUs and on TPUs. Flags that you have set in XLA_FLAGS
# or LIBTPU_INIT_ARGS come last, so they win. docs/launching.md says how these were chosen.

# FSDP (mesh.shard=params): a layer is gathered while the one before it is computed.
gpu_flags='--xla_gpu_enable_pipelined_all_gather=true'
# A link that fails ends the process, and so the job; otherwise all would wait for it for ever.
gpu_flags+=' --xla_gpu_nccl_terminate_on_error=true'
gpu_flags+=${XLA_FLAGS:+ $XLA_FLAGS}

# FSDP: layers are gathered beside matrix products. Each of the two flags needs the other.
tpu_flags='--xla_enable_async_all_gather=true'
tpu_flags+=' --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true'
# Tensor parallelism (mesh.model): the same for the sums within a layer.
tpu_flags+=' --xla_enable_async_all_reduce=true'
tpu_flags+=' --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true'
tpu_flags+=${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}

refuse() {
  echo "$1" >&2
  exit 2
}

# Refuses if the variable $1 is not set; $2 says what it is.
need() {
  if [[ -z ${!1:-} ]]; then refuse "$1 is not set: $2"; fi
}

need_command() {
  if (($# == 0)); then refuse "no command; end with one, such as: demix train --config C --workdir W"; fi
}

# Prints a command as a shell takes it.
show() {
  local words
  words=$(printf '%q ' "$@")
  echo "${words% }"
}
