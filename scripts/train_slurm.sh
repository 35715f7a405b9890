#!/usr/bin/env bash
# Trains with SLURM, one task a GPU. Before the time limit it asks to be queued again, and resumes from the last checkpoint.
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 scripts/train_slurm.sh DATA/bin --arch xmoe_transformer ...
#
# Options are those of fairseq-train; --save-interval-updates says how much may be lost. .venv must be there: source
# scripts/env.sh once on a machine that can download.
#
#   PORT  a free port of the first machine (default: 29500)
#SBATCH --job-name=xmoe
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this script with sbatch, from the project\'s folder}"
# shellcheck disable=SC1091
source .venv/bin/activate
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

requeue() {
    echo "== time is nearly up: queued again"
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

# A process that fails ends the others.
srun --kill-on-bad-exit=1 fairseq-train "$@" --user-dir xmoe_fairseq \
    --distributed-world-size "$SLURM_NTASKS" --distributed-port "${PORT:-29500}" &
# A signal interrupts the waiting, not what is waited for.
until wait $!; do
    code=$?
    kill -0 $! 2> /dev/null || exit "$code"
done
