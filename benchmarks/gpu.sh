#!/usr/bin/env bash
# All that is to be seen on a GPU, for a machine that is lent for minutes. Each part has its own time limit, writes its
# results as it goes, and stops no other by failing.
#
#   bash benchmarks/gpu.sh OUT [PART...] [--device cuda|cpu] [--quick]
#
#   tests      what only a GPU can show: tests/unit/moe/test_gpu.py and the programs of routing, compiled
#   study      trains and measures models of configs/study/rows.yaml, many at a time, those without results first
#   layer      the layer beside the dense one: benchmarks/moe_layer.py
#   programs   fairseq-train at 8,192 and 32,768 tokens a batch, and fairseq-generate, beside the dense model
#   peers      other packages' layers, where they are installed
#
#   OUT        folder for results, at most eight files: parts.jsonl has a line for each part that ended, log.txt what
#              all said, *.json their rows; study.tar.gz holds the small results of all finished runs
#   PART       default: all, in this order
#   --device   cpu tries the script without a GPU (default: cuda)
#   --quick    the smallest sizes
#   LIMIT      seconds after which all ends (default: 480), which the parts share; LIMIT_TESTS, LIMIT_STUDY, ... are
#              seconds for one part
#   DATA       prepared text of the study (default: runs/study/data), from data_prep/prepare.sh
#   WHEELS     folder of wheels to install first, without a network (default: none); see below
#   MODELS, SEEDS, JOBS, UPDATES, TRAIN   as for scripts/study.sh (defaults: all, "1 2 3", 12, 2500 and larger batches)
#
# It takes the Python that it finds, with its torch; a machine with neither network nor fairseq needs the wheels of
# fairseq-fixed, hydra-core, omegaconf, antlr4-python3-runtime, bitarray, sacrebleu, portalocker, tabulate, colorama,
# lxml, sentencepiece and torchaudio, for the tests pytest, hypothesis and sortedcontainers, for the peers fairscale and
# transformers, whichever it lacks: pip download --no-deps --python-version 3.12 ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all=(tests study layer programs peers)
fail() {
    echo "gpu.sh: error: $1" >&2
    exit "${2:-2}"
}
folder="" device=cuda quick=() parts=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --device) device=${2:-} && shift ;;
        --quick) quick=(--quick) ;;
        *) if [[ -z $folder ]]; then folder=$1; else parts+=("$1"); fi ;;
    esac
    shift || true
done
[[ -n $folder ]] || fail "give a folder, and parts if not all: bash benchmarks/gpu.sh OUT [${all[*]}]"
[[ $device == cuda || $device == cpu ]] || fail "--device $device is unknown: choose cuda or cpu"
for part in "${parts[@]}"; do
    [[ " ${all[*]} " == *" $part "* ]] || fail "there is no part $part: choose of ${all[*]}"
done
[[ ${#parts[@]} -gt 0 ]] || parts=("${all[@]}")
out=$(mkdir -p "$folder" && cd "$folder" && pwd)
python=${PYTHON:-python3}
small=${quick[0]:-}
say() {
    echo "$1" | tee -a "$out/log.txt"
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
work=$(mktemp -d)
trap 'rm -rf "$work" "$out/.site"' EXIT
if [[ -n ${WHEELS:-} ]]; then
    # One by one: a wheel of another Python stops no other.
    for wheel in "$WHEELS"/*.whl; do
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/.site" "$wheel" ||
            echo "gpu.sh: warning: $wheel is not installed"
    done
    export PYTHONPATH=$PYTHONPATH:$out/.site
fi
"$python" - "$device" <<'PYTHON' | tee -a "$out/log.txt" || exit 1
import sys
import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: error: torch sees no GPU here: try the script with --device cpu")
try:
    from triton import __version__ as triton
except ImportError:
    triton = "none"
if sys.argv[1] == "cuda":
    one = torch.cuda.get_device_properties(0)
    print(f"GPU: {one.name}, {one.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} of them")
else:
    print("GPU: none is used, for --device cpu")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton}", flush=True)
PYTHON

measure() { # FILE SCRIPT OPTIONS...: its rows go into OUT/FILE.json
    "$python" "benchmarks/$2.py" --device "$device" "${quick[@]}" --json "$out/$1.json" "${@:3}"
}

run_tests() {
    local files=(tests/unit/moe/test_{gpu,device_routing,launches}.py) static=tests/unit/moe/test_static.py
    [[ -z $small ]] || files=(tests/unit/moe/test_launches.py)
    "$python" -m pytest -q -ra -p no:cacheprovider --continue-on-collection-errors -m "" "${files[@]}" \
        "$static::test_nothing_is_read_back_from_a_gpu"
}

# The rows of the study that have no result in docs/results.
missing_rows() {
    "$python" - <<'PYTHON'
from pathlib import Path

from xmoe_fairseq.study.plan import read_plan

names = [row.name for row in read_plan(Path("configs/study/rows.yaml")).rows]
print(",".join(name for name in names if not any(Path("docs/results").glob(f"{name}-[0-9]*.json"))))
PYTHON
}

run_study() {
    local data=${DATA:-runs/study/data} seeds=${SEEDS:-1 2 3} jobs=${JOBS:-12} code=0
    local updates=${UPDATES:-2500} train=${TRAIN---max-tokens 5000 --lr 0.006}
    [[ -d $data/bin ]] || fail "there is no prepared text in $data: make it with data_prep/prepare.sh, or set DATA" 1
    # All of them come after those that are missing.
    local groups=("$(missing_rows)" "")
    [[ -z ${MODELS:-} ]] || groups=("${MODELS// /,}")
    [[ -z $small ]] || groups=(dense) seeds=1 jobs=1 updates=2 train="--max-tokens 500"
    # The models are so small that a GPU has room for many; each process keeps its own share of the processor.
    for names in "${groups[@]}"; do
        "$python" -m xmoe_fairseq study --data "$data" --out "$work/runs" --results "$work/results" \
            --models "$names" --seeds "${seeds// /,}" --jobs "$jobs" --updates "$updates" --train="$train" || code=$?
    done
    return "$code"
}

# Runs that ended wrote their results, whether or not the part came to its end.
keep_study() {
    [[ -d $work/results ]] || return 0
    tar -C "$work" -czf "$out/study.tar.gz.tmp" results
    mv "$out/study.tar.gz.tmp" "$out/study.tar.gz"
    echo "written: $out/study.tar.gz with $(find "$work/results" -name '*-[0-9]*.json' | wc -l) runs"
}

run_layer() {
    measure layer moe_layer --only training forward threshold split strata router memory growth
}

run_programs() {
    local code=0
    for tokens in 8192 32768; do
        measure "training-$tokens" training --max-tokens "$tokens" || code=$?
    done
    measure decoding decoding || code=$?
    return "$code"
}

run_peers() {
    measure peers moe_layer --only peers
}

export -f fail measure missing_rows run_tests run_study run_layer run_programs run_peers
export out device python small work
# A part's share of the time that is left to it and to those after it; of all parts, in seconds of 480.
declare -A shares=([tests]=60 [study]=150 [layer]=80 [programs]=140 [peers]=50)
begin=$SECONDS failed=() rest=0
for part in "${parts[@]}"; do rest=$((rest + shares[$part])); done
for part in "${parts[@]}"; do
    own=LIMIT_${part^^} left=$((${LIMIT:-480} - (SECONDS - begin))) start=$SECONDS code=0
    limit=${!own:-$((left * shares[$part] / rest))} rest=$((rest - shares[$part]))
    [[ $limit -le $left ]] || limit=$left
    if [[ $limit -le 0 ]]; then
        say "$part: no time is left"
        code=124
    else
        say "$part: at most $limit s"
        # A group of processes of its own, all of which end at the limit; arrays are not exported.
        timeout --kill-after=10 "$limit" bash -euo pipefail -c "quick=(${quick[*]}); run_$part" |& tee -a "$out/log.txt" ||
            code=$?
        [[ $((SECONDS - start)) -lt $limit ]] || code=124
    fi
    [[ $part != study ]] || keep_study
    echo "{\"part\": \"$part\", \"device\": \"$device\", \"code\": $code, \"seconds\": $((SECONDS - start))}" >>"$out/parts.jsonl"
    # A time limit is no failure: what is finished counts.
    [[ $code -eq 0 || $code -eq 124 ]] || failed+=("$part")
    say "$part: code $code after $((SECONDS - start)) s"
done
[[ ${#failed[@]} -eq 0 ]] || fail "these parts failed, see $out/log.txt: ${failed[*]}" 1
