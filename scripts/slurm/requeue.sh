# Sourced by the batch scripts right before their step, which they start in the background; on Slurm's notice
# (--signal=B:USR1@120) it ends the step and puts the job back into the queue.
requeue() {
  echo "the time is almost up: requeueing" >&2
  kill "$!"
  wait "$!" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1
