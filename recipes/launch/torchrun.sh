#!/usr/bin/env bash
# One node of a job that survives the death of nodes: start it on each node, and on nodes that stand by.
#
#   STORE=head:29400 NODES=4 RANKS=8 MICS_KEEPER_TOKEN=... recipes/launch/torchrun.sh train.py ARGUMENTS
#
# STORE is the address of the store in which launchers meet, on a machine that does not die with the nodes of the
# job: `STORE=:29400 recipes/launch/torchrun.sh store` holds it there. A node beyond NODES waits until another one dies.
# Where all nodes start the same, STORE_NODE is the rank of the one that holds the store.
# docs/survival.md says what each setting is for.

set -eu

if [[ "${1:-}" == store || "${NODE_RANK:-}" == "${STORE_NODE:-none}" ]]; then
    exec python -c 'import signal, sys; from datetime import timedelta; from torch.distributed import TCPStore
store = TCPStore("0.0.0.0", int(sys.argv[1]), is_master=True, wait_for_workers=False, timeout=timedelta(days=365))
signal.pause()' "${STORE##*:}"
fi

# Every start of the job finds its keepers by it, and nobody else does.
: "${MICS_KEEPER_TOKEN:?export MICS_KEEPER_TOKEN=\$(openssl rand -hex 32), the same on all nodes}"
export MICS_KEEPER_TOKEN

# Else ranks that are started again read what the attempt before has left, and a new node waits for an address (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-20}" \
    --rdzv-backend c10d --rdzv-endpoint "$STORE" --rdzv-id "${JOB:-mics}" \
    --rdzv-conf is_host=0,keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1 \
    -m lightning_mics warm "$@"
