#!/usr/bin/env bash
# Trains the baselines, SMoE and XMoE side by side on one data set, with several seeds, and says what each brings:
# a page, tables and pictures, and a verdict on each claim. Killed at any moment, the same command resumes.
#
#   INPUT    folder with {train,valid,test}.{xx}-en.{xx} and .en (needed once, to prepare the data)
#   STUDY    where everything is written (default: runs/study): a folder for each model and seed
#   RESULTS  where the small results are kept (default: STUDY): NAME-SEED.json of each run, results.md, results.json,
#            results.tsv, curves, experts and quality as .png and .svg. A run whose file is there is done.
#   ROWS     the models and claims (default: configs/study/rows.yaml)
#   MODELS   which of them, by name (default: all)
#   SEEDS    of initialisation, sampling and dropout (default: "1 2 3")
#   JOBS     runs at a time (default: 1), each one thread on a CPU; several share a GPU
#   UPDATES  training steps of each run (default: 10000)
#   VOCAB    SentencePiece pieces (default: 4000)
#   BEAM     hypotheses in the search (default: 4)
#   TRAIN    more options of fairseq-train for all runs, such as "--bf16 --max-tokens 8000"
#
# In the background, giving way to all other work: setsid nohup nice -n 19 bash scripts/study.sh > study.log 2>&1 &
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

STUDY=${STUDY:-runs/study}
VOCAB=${VOCAB:-4000}
models=${MODELS:-}
seeds=${SEEDS:-1 2 3}

whole VOCAB 1
[[ -d $STUDY/data/bin ]] || : "${INPUT:?set INPUT to the folder with the text}"
same_settings "$STUDY" "VOCAB=$VOCAB"
if [[ ! -d $STUDY/data/bin ]]; then
    bash data_prep/prepare.sh --benchmark local --input "$INPUT" --out "$STUDY/data" --vocab-size "$VOCAB"
fi
exec python -m xmoe_fairseq study --data "$STUDY/data" --out "$STUDY" --results "${RESULTS:-$STUDY}" \
    --rows "${ROWS:-configs/study/rows.yaml}" --models "${models// /,}" --seeds "${seeds// /,}" --jobs "${JOBS:-1}" \
    --updates "${UPDATES:-10000}" --beam "${BEAM:-4}" --train="${TRAIN:-}"
