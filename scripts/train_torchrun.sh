#!/usr/bin/env bash
# Trains with several processes of this machine, or of several machines that see the same folders. Run again, it goes
# on from the last checkpoint; a process that fails ends the others, and all start again from there.
#
#   bash scripts/train_torchrun.sh DATA/bin --arch xmoe_transformer ...      options are those of fairseq-train
#
#   PROCESSES  of this machine (default: its GPUs; without any, its cores)
#   RESTARTS   how often to start again after a failure (default: 3)
#   NODES      machines (default: 1); run this script on each, with the same HEAD
#   HEAD       host:port of the first machine, any free port (needed for more machines than one)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
PROCESSES=${PROCESSES:-$((gpus > 0 ? gpus : $(nproc)))}
NODES=${NODES:-1} RESTARTS=${RESTARTS:-3}
whole PROCESSES 1
whole NODES 1
whole RESTARTS 0
if ((NODES > 1)); then
    meet=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "${HEAD:?set HEAD to host:port of the first machine}")
else
    meet=(--standalone)
fi
exec torchrun "${meet[@]}" --nproc_per_node "$PROCESSES" --max-restarts "$RESTARTS" \
    "$(command -v fairseq-train)" "$@" --user-dir xmoe_fairseq
