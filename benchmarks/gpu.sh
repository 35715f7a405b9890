#!/usr/bin/env bash
# What is to be seen on a GPU, for a machine that is lent for minutes: one command, a time limit, and what is finished by
# then is kept.
#
#   bash benchmarks/gpu.sh OUT study      trains and measures the models of configs/study/rows.yaml, many at a time
#
#   OUT      folder for results; study.tar.gz holds the small results of all finished runs
#   LIMIT    seconds after which it ends (default: 400)
#   DATA     prepared text (default: runs/study/data), from data_prep/prepare.sh
#   WHEELS   folder of wheels to install first, without a network (default: none); see below
#   MODELS, SEEDS, JOBS, UPDATES, TRAIN   as for scripts/study.sh (defaults: all, "1 2 3", 12, 2500 and larger batches)
#
# It takes the Python that it finds, with its torch; a machine with neither network nor fairseq needs the wheels of
# fairseq-fixed, hydra-core, omegaconf, antlr4-python3-runtime, bitarray, sacrebleu, portalocker, tabulate, colorama,
# lxml, sentencepiece and torchaudio, whichever it lacks: pip download --no-deps --python-version 3.12 ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ $# -eq 2 && $2 == study ]] || {
    echo "gpu.sh: error: give a folder and what to do: bash benchmarks/gpu.sh OUT study" >&2
    exit 2
}
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
models=${MODELS:-}
seeds=${SEEDS:-1 2 3}
data=${DATA:-runs/study/data}
[[ -d $data/bin ]] || {
    echo "gpu.sh: error: there is no prepared text in $data: make it with data_prep/prepare.sh, or set DATA" >&2
    exit 1
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/.site" "$WHEELS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$out/.site
fi

work=$(mktemp -d)
trap 'rm -rf "$work" "$out/.site"' EXIT
# At the limit the whole group of processes ends; each run wrote its result as it ended.
# The models are so small that a GPU has room for many; each process keeps its own share of the processor.
timeout --kill-after=10 "${LIMIT:-400}" "$python" -m xmoe_fairseq study --data "$data" \
    --out "$work/runs" --results "$work/results" --models "${models// /,}" --seeds "${seeds// /,}" \
    --jobs "${JOBS:-12}" --updates "${UPDATES:-2500}" --train="${TRAIN---max-tokens 5000 --lr 0.006}" || code=$?
# The time limit is no failure: what is finished counts.
[[ ${code:-0} -eq 0 || ${code:-0} -eq 124 ]] || echo "gpu.sh: error: the study ended with code $code" >&2
tar -C "$work" -czf "$out/study.tar.gz.tmp" results
mv "$out/study.tar.gz.tmp" "$out/study.tar.gz"
echo "written: $out/study.tar.gz with $(find "$work/results" -name '*-[0-9]*.json' | wc -l) runs"
[[ ${code:-0} -eq 0 || ${code:-0} -eq 124 ]] || exit "$code"
