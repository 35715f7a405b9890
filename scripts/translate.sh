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

fail() {
    echo "translate.sh: error: $1" >&2
    exit 1
}

[[ $# -ge 2 ]] || fail "give DATA and RUN, the folders of the data and of the run"
data=$1 run=$2
shift 2
checkpoint=$run/checkpoints/checkpoint_best.pt
if [[ ${1:-} == *.pt ]]; then
    checkpoint=$1
    shift
fi
wanted=()
while [[ $# -gt 0 && $1 != -- ]]; do
    wanted+=("$1")
    shift
done
shift $(($# > 0))
[[ -f $data/MANIFEST.json ]] || fail "there is no $data/MANIFEST.json: make the data with data_prep/prepare.sh"
[[ -f $checkpoint ]] || fail "there is no checkpoint $checkpoint: train first, or give its path"
mapfile -t known < "$data/bin/lang_pairs.txt"
for pair in ${wanted[@]+"${wanted[@]}"}; do
    [[ " ${known[*]} " == *" $pair "* ]] || fail "$data has no direction $pair: choose from ${known[*]:0:8} ..."
done
[[ ${#wanted[@]} -gt 0 ]] || wanted=("${known[@]}")

python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
read -r name beam lenpen < <("$python" - "$data/MANIFEST.json" <<'PY'
import json, sys
from xmoe_fairseq.benchmarks import BENCHMARKS
benchmark = BENCHMARKS[json.load(open(sys.argv[1], encoding="utf-8"))["benchmark"]]
print(benchmark.name, benchmark.beam, benchmark.lenpen)
PY
) || fail "$data/MANIFEST.json cannot be read: prepare the data again"

for pair in "${wanted[@]}"; do
    out=$run/generate/$pair
    if [[ -d $out ]]; then
        echo "== $pair: translated before"
        continue
    fi
    echo "== $pair"
    rm -rf "$out.part"
    "$python" -m fairseq_cli.generate "$data/bin" --user-dir "$root/xmoe_fairseq" --task "multilingual_$name" \
        --source-lang "${pair%-*}" --target-lang "${pair#*-}" --path "$checkpoint" \
        --bpe sentencepiece_bytes --sentencepiece-model "$data/bin/spm.model" \
        --beam "$beam" --lenpen "$lenpen" --max-tokens 6000 --num-workers 0 --results-path "$out.part" "$@" < /dev/null
    mv "$out.part" "$out"
done
