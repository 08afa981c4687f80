# The part of a SLURM job that is the same on every cluster; the .sbatch files source it after their own settings.
#
# One task per GPU: Lightning reads ranks from SLURM. A job that runs out of time, or loses a node, is queued again and goes
# on from its last checkpoint. Where it starts is the root of the repository: sbatch recipes/launch/FAMILY.sbatch ARGUMENTS

set -u

# libfabric: https://github.com/aws-samples/awsome-distributed-training, 1.architectures/efa-cheatsheet.md
export FI_PROVIDER=efa          # fail, rather than train over TCP
export FI_EFA_USE_HUGE_PAGE=0   # workers of a DataLoader are forked, which huge pages let fail
# Not set, as libfabric 1.18 and aws-ofi-nccl 1.7 choose it: FI_EFA_USE_DEVICE_RDMA; nor FI_EFA_FORK_SAFE, for kernels
# before 5.15. NCCL_ALGO and NCCL_PROTO: aws-ofi-nccl brings a tuner.

# NCCL and gloo meet over an ordinary interface: NCCL's user guide, "Environment Variables"
export NCCL_SOCKET_IFNAME='^lo,docker'
export NCCL_DEBUG=WARN

# Each rank keeps to its own cores. Since SLURM 22.05 srun does not inherit --cpus-per-task (srun's manual).
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"

again=0
# Sent before the time is up (#SBATCH --signal). srun passes SIGTERM on, upon which all ranks save and leave together.
trap 'again=1; kill -TERM "$job"' USR1

# SLURM_RESTART_COUNT is there once the job has been queued again.
srun --cpu-bind=cores --kill-on-bad-exit=1 python train.py "$@" ${SLURM_RESTART_COUNT:+resume=auto} &
job=$!
wait "$job"
status=$?
if ((again)); then # the trap has ended the first wait
    wait "$job"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
