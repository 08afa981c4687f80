# shellcheck shell=bash
# The part of a SLURM job that is the same on every cluster; the .sbatch files source it after their own settings.
#
# One task per GPU: Lightning reads ranks from SLURM. A job whose time is nearly up, that is preempted, or that loses a
# node is queued again and resumes from its last checkpoint. It starts in the root of the repository:
# sbatch --nodes=N recipes/launch/FAMILY.sbatch ARGUMENTS OF train.py

set -u

# shellcheck source=recipes/launch/environment.sh
source "${SLURM_SUBMIT_DIR:-.}/recipes/launch/environment.sh"

# SLURM signals the tasks of a job that it preempts, but not this script, and does not queue a job again that ends within
# its grace time (SLURM's src/interfaces/preempt.c); the ranks do, as soon as they have saved.
preempted() {
    [[ "$(scontrol show job "$SLURM_JOB_ID")" =~ PreemptTime=[0-9] ]]
}

time_is_up=0
# By #SBATCH --signal. The ranks receive SIGTERM, upon which all save and leave together. It goes to the steps of the
# job, not to this script (scancel's manual) and not to srun, which would kill its tasks at once.
trap 'time_is_up=1; [[ -z "${keepers:-}" ]] || kill -USR1 "$job"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# SLURM_RESTART_COUNT is there once the job has been queued again.
arguments=("$@" ${SLURM_RESTART_COUNT:+resume=auto})
if [[ " $* " == *" strategy.in_memory_checkpoint="[0-9]* ]]; then
    # shellcheck source=recipes/launch/in_memory.sh
    source "${SLURM_SUBMIT_DIR:-.}/recipes/launch/in_memory.sh"
    keep &
    keepers=$!
    train_on "${arguments[@]}" &
else
    srun python train.py "${arguments[@]}" &
fi
job=$!
wait "$job"
status=$?
if ((time_is_up)); then # the trap has ended the first wait
    wait "$job"
    status=$?
fi
[[ -z "${keepers:-}" ]] || kill "$keepers" 2>/dev/null
if ((time_is_up && status == 0)) || preempted; then # a job that fails would be queued again for ever
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
