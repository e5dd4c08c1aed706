#!/bin/bash
# One node of eight GPUs, or several: sbatch --nodes=1 deploy/slurm.sh (from the checkout, installed
# there). A job that is preempted or loses a node is queued again, and goes on where it was.
#SBATCH --job-name=eupe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --output=eupe-%j.log
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export EUPE_HOME="${EUPE_HOME:-$SLURM_SUBMIT_DIR}" # a file system that every node mounts
export PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$EUPE_HOME/ray_token-$SLURM_JOB_ID"
export RAY_USAGE_STATS_ENABLED=0
(umask 077 && head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
ulimit -n 65536

# Asked to end, a minute before Slurm does it, the command saves its step; Ray must live until then.
trap 'pkill -TERM -f "$SLURM_SUBMIT_DIR/.venv/bin/eupe run"' TERM
# Starts Ray on every node, the command on the first one, and ends Ray after it. --exclusive above:
# it would end every Ray of a node.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  env RAY_ADDRESS="$head:6379" RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 \
  eupe run imagenet1k_vits16 &
wait $! || code=$?                    # it returns when the signal comes,
[[ ${code:-0} -ne 143 ]] || wait $! # and then the command still saves
exit "${code:-0}"
