# Sourced by the batch scripts with the process to wait for; on Slurm's notice (--signal=B:USR1@120) it ends that and puts
# the job back into the queue.
step=$1

requeue() {
  echo "the time is almost up: requeueing" >&2
  kill "$step"
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1
wait "$step"
