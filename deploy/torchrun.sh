#!/usr/bin/env bash
# Starts this machine's ranks with torchrun. They join the coordinator of `csps serve --workers 0`.
#
#   deploy/torchrun.sh HOST:PORT [flags of csps worker]
#
# HOST:PORT is where `csps serve --control` listens. The environment says the rest; Slurm and
# LeaderWorkerSet give the first two by themselves:
#
#   NNODES           machines (1)
#   NODE_RANK        number of this one, from 0 (0)
#   NPROC_PER_NODE   ranks of each machine (its GPUs; 1 without any)
#   MASTER_ADDR      machine 0, where ranks meet (HOST)
#   MASTER_PORT      a port there that is free (29500)
#   OMP_NUM_THREADS  CPU threads of a rank (cores / ranks)
#   PYTHON           the interpreter that has csps (python3)
set -euo pipefail

coordinator=${1:?usage: deploy/torchrun.sh HOST:PORT [flags of csps worker]}
shift

nodes=${NNODES:-${SLURM_NNODES:-${LWS_GROUP_SIZE:-1}}}
node=${NODE_RANK:-${SLURM_NODEID:-${LWS_WORKER_INDEX:-0}}}
master=${MASTER_ADDR:-${coordinator%:*}}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# torchrun would set 1. It must be known before OpenMP starts.
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# A pod's name resolves once the pod has an address; torchrun does not wait for that.
for ((tries = 0; tries < 300; tries++)); do
  getent hosts "$master" >/dev/null && break
  sleep 2
done

# No restarts: ranks that lost a peer cannot go on, and the coordinator ends with them.
exec "${PYTHON:-python3}" -m torch.distributed.run \
  --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$ranks" --max-restarts 0 \
  --master-addr "$master" --master-port "${MASTER_PORT:-29500}" \
  -m csps worker --coordinator "$coordinator" "$@"
