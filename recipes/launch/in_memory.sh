# shellcheck shell=bash
# A SLURM job whose training survives the death of nodes; job.sh sources it if strategy.in_memory_checkpoint is given.
# Not run under SLURM: tests run it with programs that only note how they are called.
#
#   sbatch --no-kill --nodes=9 --export=ALL,SPARES=1 recipes/launch/p4d.sbatch model=... strategy.in_memory_checkpoint=1
#
# The keepers are a step of their own, because SLURM ends every process of a step with it. The ranks are another step, on
# the nodes that live: when it fails, it is started again, a spare node in the place of a dead one, up to RESTARTS times.
# A job that SLURM queues again has lost its memory, and resumes from its disk.

NODES=$((SLURM_JOB_NUM_NODES - ${SPARES:-0}))
MICS_KEEPER_TOKEN="${MICS_KEEPER_TOKEN:-$(openssl rand -hex 32)}"
export MICS_KEEPER_TOKEN
export MICS_KEEPER_STARTED=1 # ranks find their keeper, and wait for it

# The nodes of the job that SLURM can still reach, one per line.
living_nodes() {
    local dead
    dead=" $(sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=down,fail,no_respond --format=%N | tr '\n' ' ')"
    scontrol show hostnames "$SLURM_JOB_NODELIST" | while read -r node; do
        [[ "$dead" == *" $node "* ]] || echo "$node"
    done
}

# Keepers listen on the interface by which this node is reached; one that dies does not end the others.
keep() {
    MASTER_ADDR="$(living_nodes | head -n 1)" SLURM_KILL_BAD_EXIT=0 exec srun --overlap --no-kill --kill-on-bad-exit=0 \
        --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 \
        python -m lightning_mics keeper
}

# One start of the ranks, which see a job of NODES nodes.
train() {
    local nodes
    nodes="$(living_nodes | head -n "$NODES")"
    if (($(wc -l <<<"$nodes") < NODES)); then
        echo "fewer than $NODES nodes are left" >&2
        return 1
    fi
    MASTER_ADDR="$(head -n 1 <<<"$nodes")" srun --overlap --no-kill --nodes="$NODES" --nodelist="${nodes//$'\n'/,}" \
        --ntasks=$((NODES * SLURM_NTASKS_PER_NODE)) env SLURM_NNODES="$NODES" python train.py "$@"
}

# In the place of one `srun python train.py`: as often as it takes. A death is not the last word of the job.
train_on() {
    local status=1 first="${SLURM_RESTART_COUNT:-0}" attempt time_is_up=0
    trap 'time_is_up=1' USR1 # from job.sh: a start that fails then is the last one
    for ((attempt = first; attempt <= first + ${RESTARTS:-20}; attempt++)); do
        export SLURM_RESTART_COUNT=$attempt # ranks never begin anew without a word where it is more than zero
        train "$@" && return 0
        status=$?
        ((time_is_up == 0 && $(living_nodes | wc -l) >= NODES)) || break
    done
    return "$status"
}
