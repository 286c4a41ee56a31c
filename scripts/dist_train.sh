#!/bin/sh
# Train a detector in N processes: N GPUs of this machine, or N processes on CPUs where there is no GPU.
#
#     scripts/dist_train.sh CONFIG N [ARGS of cse-search train]
#
# On several machines, on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=host PORT=29500 scripts/dist_train.sh CONFIG N
set -eu
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG N [ARGS of cse-search train]" >&2
    exit 2
fi
config=$1
processes=$2
shift 2
if [ -n "${NNODES:-}" ]; then
    where="--nnodes=$NNODES --node_rank=${NODE_RANK:-0} --master_addr=${MASTER_ADDR:-127.0.0.1} --master_port=${PORT:-29500}"
else
    where="--standalone"
fi
# shellcheck disable=SC2086 - $where is several words
exec "${PYTHON:-python}" -m torch.distributed.run $where --nproc_per_node="$processes" \
    -m cse_autoloss.cli train "$config" --launcher pytorch "$@"
