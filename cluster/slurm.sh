#!/bin/bash
# A Ray cluster for one run on Slurm, from a folder that all nodes share: sbatch cluster/slurm.sh pretrain CONFIG.yaml [key=value ...]
# The job is requeued when it is pre-empted, and goes on from its last checkpoint. README.md beside this file tells when to use it.
#SBATCH --job-name=raysparse
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# A token for this job alone; without one, everyone who reaches the nodes may run code in your name.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0

read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # no `| head`: scontrol would die of it, and the script with it

# One command on every node: the head's raysparse starts when all of them are there, and its end stops Ray on each (hence --exclusive).
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ray symmetric-run --address "$head_node:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --dashboard-host=127.0.0.1 \
    -- python -m raysparse "$@" &
srun=$!

# Two minutes before the time is up (and before pre-emption, where PreemptParameters=send_user_signal) the run is told to save and leave.
# It is the process on this node that Slurm's own signal would reach together with all of Ray.
trap 'pkill -TERM -u "$(id -u)" -f "^[^ ]*python[^ ]* -m raysparse"' TERM
wait "$srun" && status=0 || status=$?
while kill -0 "$srun" 2>/dev/null; do # the signal has ended the wait, not the run
    wait "$srun" && status=0 || status=$?
done
if [ "$status" -eq 143 ]; then # saved and left: the same job goes on from there
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
