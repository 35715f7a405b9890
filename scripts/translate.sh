#!/usr/bin/env bash
# Translates the test sets of all directions, or of some, with a trained model. Run again, it goes on where it stopped.
#
#   bash scripts/translate.sh DATA RUN [CHECKPOINT] [SRC-TGT ...] [-- OPTION ...]
#
#   DATA        folder made by data_prep/prepare.sh
#   RUN         folder of the run; RUN/generate/SRC-TGT is written for each direction
#   CHECKPOINT  default: RUN/checkpoints/checkpoint_best.pt
#   SRC-TGT     directions; default: all, in the order of DATA/bin/lang_pairs.txt
#   OPTION      more for fairseq-generate, such as --max-tokens 12000 --fp16
#
# Beam and length penalty are those of the benchmark that DATA was prepared for. A folder under its final name is
# complete and is skipped: remove it to translate again. PYTHON names the interpreter (default: python).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" -m xmoe_fairseq.evaluation.translate "$@"
