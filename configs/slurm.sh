#!/usr/bin/env bash
# sbatch configs/slurm.sh LATENTS OUT [options of slfm_train]
# One task per GPU. Two minutes before time is up Slurm sends SIGUSR1; training saves and exits with 0, and the job queues itself again until it is done.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
log="$2.slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.out"
srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec slfm_train "$@"' slfm_train "$@" | tee "$log"
if grep -q 'stopped by a signal' "$log"; then scontrol requeue "$SLURM_JOB_ID"; fi
