#!/usr/bin/env bash
# Trains the baselines, SMoE and XMoE side by side on one data set and writes a table: models with experts have equal
# parameters, the dense one equal active FLOPs. Run again, it goes on where it stopped.
#
#   INPUT    folder with {train,valid,test}.{xx}-en.{xx} and .en (needed once, to prepare the data)
#   STUDY    where everything is written (default: runs/study): results.md, and a folder for each model
#   UPDATES  training steps of each model (default: 3000)
#   VOCAB    SentencePiece pieces (default: 4000)
#   MODELS   which of them, in the order of the table (default: all)
#   BEAM     hypotheses in the search (default: 4)
#   SEED     of initialisation, sampling and dropout (default: 1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

STUDY=${STUDY:-runs/study}
UPDATES=${UPDATES:-3000}
VOCAB=${VOCAB:-4000}
BEAM=${BEAM:-4}
SEED=${SEED:-1}
MODELS=${MODELS:-dense switch gshard eom cmr smoe-2-2-2-2 xmoe}
DATA=$STUDY/data

# The options in which the models differ; all are d 128, 2+2 layers, experts in every second layer.
declare -A ARCH=(
    # Top-2 of 256 hidden units in every second layer, 256 in the others: 384 in all layers costs the same.
    [dense]="moe_transformer_tiny --moe-placement none --encoder-ffn-embed-dim 384"
    [switch]="moe_transformer_tiny --moe-router switch --moe-capacity-factor 1"
    [gshard]="moe_transformer_tiny"
    [eom]="moe_transformer_tiny --moe-regularizer eom"
    [cmr]="moe_transformer_tiny --moe-regularizer cmr"
    [smoe-2-2-2-2]="smoe_transformer_tiny --moe-loss-combine average"
    # Twice as many experts of half the size.
    [xmoe]="xmoe_transformer_tiny --encoder-normalize-before --decoder-normalize-before --moe-num-experts 16"
)

train() {
    local name=$1
    # shellcheck disable=SC2086
    fairseq-train "$DATA/bin" --user-dir xmoe_fairseq --task multilingual_local --arch ${ARCH[$name]} \
        --share-all-embeddings --dropout 0.1 --seed "$SEED" \
        --criterion threshold_routing_cross_entropy --label-smoothing 0.1 --moe-loss-coeff 0.01 \
        --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 0.003 --warmup-updates 100 \
        --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --end-learning-rate 0 \
        --max-tokens 2500 --max-update "$UPDATES" --num-workers 0 --distributed-world-size 1 \
        --save-dir "$STUDY/$name/checkpoints" --no-epoch-checkpoints --log-interval 50 --log-format simple \
        --log-file "$STUDY/$name/train.log"
}

same_settings "$STUDY" "UPDATES=$UPDATES VOCAB=$VOCAB BEAM=$BEAM SEED=$SEED"
if [[ ! -d $DATA/bin ]]; then
    : "${INPUT:?set INPUT to the folder with the text}"
    bash data_prep/prepare.sh --benchmark local --input "$INPUT" --out "$DATA" --vocab-size "$VOCAB"
fi
for name in $MODELS; do
    if [[ -f $STUDY/$name/report.json ]]; then
        echo "== $name: done before"
        continue
    fi
    echo "== $name"
    mkdir -p "$STUDY/$name"
    train "$name"
    bash scripts/translate.sh "$DATA" "$STUDY/$name" "$STUDY/$name/checkpoints/checkpoint_last.pt" -- --beam "$BEAM"
    python -m xmoe_fairseq report "$STUDY/$name" --data "$DATA" \
        --checkpoint "$STUDY/$name/checkpoints/checkpoint_last.pt"
done
# shellcheck disable=SC2086
python -m xmoe_fairseq.evaluation.study --study "$STUDY" $MODELS
echo "== $STUDY/results.md"
