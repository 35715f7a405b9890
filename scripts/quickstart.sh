#!/usr/bin/env bash
# From a bare machine to a table of BLEU scores: installs, builds the embedded corpus, trains a small XMoE model on
# 8 directions, translates the test sets, scores them. Run again, it resumes where it stopped.
#
#   RUN      where the run is written (default: runs/demo4): report.html, report.md, report.json, report.png
#   DATA     where the data is written (default: data/demo4)
#   UPDATES  training steps (default: 1000)
#   PREPARE  more options for data_prep/prepare.sh, such as "--train 2000"
#   TRAIN    more options for fairseq-train, such as "--moe-threshold 0.5"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

RUN=${RUN:-runs/demo4}
DATA=${DATA:-data/demo4}
UPDATES=${UPDATES:-1000}
whole UPDATES 1
# More threads than this only wait for each other in so small a model.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}
same_settings "$RUN" "DATA=$DATA UPDATES=$UPDATES PREPARE=${PREPARE:-} TRAIN=${TRAIN:-}"

# stage NAME COMMAND...: runs the command unless it was finished before, and notes the seconds it took.
stage() {
    local name=$1 start=$EPOCHREALTIME
    shift
    if [[ -f $RUN/.done/$name ]]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    "$@"
    mkdir -p "$RUN/.done"
    python - "$start" "$EPOCHREALTIME" > "$RUN/.done/$name.tmp" <<'PY'
import sys
print(round(float(sys.argv[2]) - float(sys.argv[1]), 1))
PY
    mv "$RUN/.done/$name.tmp" "$RUN/.done/$name"
}

train() {
    # shellcheck disable=SC2086
    fairseq-train "$DATA/bin" --user-dir xmoe_fairseq --task multilingual_demo4 \
        --arch xmoe_transformer_tiny --share-all-embeddings --encoder-normalize-before --decoder-normalize-before \
        --dropout 0 --criterion threshold_routing_cross_entropy --label-smoothing 0.1 --moe-loss-coeff 0.01 \
        --optimizer moe_adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 0.003 --warmup-updates 100 \
        --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --end-learning-rate 0 \
        --max-tokens 2000 --max-update "$UPDATES" --num-workers 0 --distributed-world-size 1 \
        --save-dir "$RUN/checkpoints" --save-interval-updates 200 --keep-interval-updates 1 --no-epoch-checkpoints \
        --log-interval 20 --log-file "$RUN/train.log" ${TRAIN:-}
}

translate() {
    bash scripts/translate.sh "$DATA" "$RUN" "$RUN/checkpoints/checkpoint_last.pt" -- --max-len-b 100
}

analyze() {
    python -m xmoe_fairseq analyze --checkpoint "$RUN/checkpoints/checkpoint_last.pt" --data "$DATA" --out "$RUN/analysis"
}

report() {
    python - "$RUN" <<'PY'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
seconds = {}
for path in sorted((run / ".done").iterdir(), key=lambda p: p.stat().st_mtime):
    try:
        seconds[path.name] = float(path.read_text())
    except (OSError, ValueError):
        sys.exit(f"error: {path} does not hold the seconds of a stage: remove it, and the stage runs again")
(run / "seconds.json").write_text(json.dumps(seconds, indent=1))
PY
    python -m xmoe_fairseq report "$RUN" --data "$DATA" --task multilingual_demo4 \
        --checkpoint "$RUN/checkpoints/checkpoint_last.pt"
}

# shellcheck disable=SC2086
stage data bash data_prep/prepare.sh --benchmark demo4 --out "$DATA" ${PREPARE:-}
stage train train
stage translate translate
stage analyze analyze
report
echo "== report: $RUN/report.html, $RUN/report.md, $RUN/report.png"
