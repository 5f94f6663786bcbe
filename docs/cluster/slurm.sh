#!/usr/bin/env bash
# sbatch docs/cluster/slurm.sh: two machines of eight GPUs. A job whose time ends is sent SIGTERM two minutes
# before, saves and ends; then it is queued again and continues. (So is a preempted job, if the cluster sets
# PreemptParameters=send_user_signal and a GraceTime.)
#SBATCH --job-name=channeltok
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

RUN=runs/generator-l
STARTED=$(mktemp)
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# the first start has no checkpoint to resume
RESUME=$(compgen -G "$RUN/checkpoints/step-*" > /dev/null && echo --resume || true)
# seconds the launcher waits for its processes to save; a setting since torch 2.15. torch 2.11 waits 30 seconds: write
# checkpoints often there
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
export HEAD RUN RESUME

# the launcher runs once a machine; exec, so that signals reach it. A launcher that receives SIGTERM does not exit with 0.
srun bash -c 'exec accelerate launch \
    --multi_gpu --mixed_precision bf16 --num_machines "$SLURM_NNODES" --num_processes $((8 * SLURM_NNODES)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port 29500 --rdzv_backend c10d \
    train_ar.py --config configs/paper-generator.yaml --size L --learning-rate 3e-4 --position-weighting linear \
    --tokens runs/tokens --output-dir "$RUN" $RESUME' || true

# not finished, but further than when this job began: queue it again
if [ ! -f "$RUN/loss.png" ] && [ -n "$(find "$RUN/checkpoints" -newer "$STARTED" -name training.json)" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
