#!/usr/bin/env bash
# Runs a verb on a TPU slice of a GKE cluster that has JobSet installed (jobset.sigs.k8s.io).
#
#   NAME=a IMAGE=us-docker.pkg.dev/p/demix ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 VOLUME=runs \
#     bash launch/gke_jobset.sh demix train --config configs/paper_1300m.py --workdir /runs/a
#
# NAME          of the JobSet
# IMAGE         with this package and its `tpu` extra
# ACCELERATOR   tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
# TOPOLOGY      chips in the slice
# VOLUME        PersistentVolumeClaim with ReadWriteMany, mounted on every host as /runs
# CHIPS         in one host; default 4
# MAX_RESTARTS  of the whole job after a host or process was lost, each from the last checkpoint;
#               default 10
# DRY=1         prints the manifest and applies nothing
#
# To run the same NAME again, delete what is left of it: kubectl delete jobset NAME
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "$0")/flags.sh"
need NAME "the name of the JobSet, such as NAME=train-a"
need IMAGE "a container image with demix_jax[tpu]"
need ACCELERATOR "the kind of TPU, such as ACCELERATOR=tpu-v5p-slice"
need TOPOLOGY "the chips in the slice, such as TOPOLOGY=4x4x4"
need VOLUME "the PersistentVolumeClaim for /runs, shared by all hosts"
need_command "$@"
CHIPS=${CHIPS:-4}
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || refuse "TOPOLOGY=$TOPOLOGY; use one such as 4x4x4"
chips=$((${TOPOLOGY//x/*}))
((chips % CHIPS == 0)) || refuse "TOPOLOGY=$TOPOLOGY has $chips chips, not whole hosts of CHIPS=$CHIPS"
hosts=$((chips / CHIPS))

quoted=() # for YAML
for word in "$@"; do quoted+=("'${word//\'/\'\'}'"); done
command=$(IFS=, && echo "${quoted[*]}")

manifest() {
  cat <<EOF
# kubectl apply -f -
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations: # no other job on the hosts of the slice
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${MAX_RESTARTS:-10}
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0 # one host that fails ends, and restarts, the whole job
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300 # to save in
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: demix
              image: $IMAGE
              command: [$command]
              env:
              - name: LIBTPU_INIT_ARGS
                value: '${tpu_flags//\'/\'\'}'
              resources:
                limits:
                  google.com/tpu: $CHIPS
              volumeMounts:
              - name: runs
                mountPath: /runs
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $VOLUME
EOF
}
if [[ -n ${DRY:-} ]]; then
  manifest
else
  manifest | kubectl apply -f -
fi
