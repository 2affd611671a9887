#!/usr/bin/env bash
# sbatch configs/slurm.sh LATENTS OUT [options of slfm_train]
# One task per GPU, started by srun, so no launcher stands between Slurm and the processes. Five minutes before time is
# up each of them gets SIGUSR1 (`B:` before it would give it to this script alone); training saves and exits with 0, and
# the job queues itself again until it is done. Where one task fails, all end.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # two jobs on a machine need two ports
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun has it
log="$2.slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.out"
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec slfm_train "$@"' \
    slfm_train "$@" | tee "$log"
if grep -q 'stopped by a signal' "$log"; then scontrol requeue "$SLURM_JOB_ID"; fi
