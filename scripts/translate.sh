#!/usr/bin/env bash
# Translates a test set in all directions of a model, or in some: the command `xmoe translate`. Run again, it goes on
# where it stopped.
#
#   bash scripts/translate.sh DATA RUN [CHECKPOINT] [--subset SET] [--overwrite] [SRC-TGT ...] [-- OPTION ...]
#
#   DATA         folder made by data_prep/prepare.sh
#   RUN          folder of the run; RUN/generate/SRC-TGT is written for each direction
#   CHECKPOINT   default: checkpoint_best.pt of RUN/checkpoints or of RUN, or else checkpoint_last.pt
#   --subset     valid, or a further set such as test1, which may lack references: RUN/generate-SET/SRC-TGT is written
#   --overwrite  translates again what is finished; each old folder stays until the new one is complete
#   SRC-TGT      directions, also zero-shot ones; default: those that the model was trained on, in the order of
#                DATA/bin/lang_pairs.txt
#   OPTION       more for fairseq-generate, such as --max-tokens 12000 --fp16
#
# Beam and length penalty are those of the benchmark that DATA was prepared for, language tokens those that the model
# was trained with. A folder under its final name is complete and is skipped; where it was translated with another
# checkpoint or other options, that is an error. PYTHON names the interpreter (default: python).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python}" -m xmoe_fairseq translate "$@"
