#!/usr/bin/env bash
# Runs stock fairseq's own tests of text on a CPU, without this plugin and with it imported, and compares them test by test.
#
#   bash scripts/fairseq_tests.sh CHECKOUT                  all: half an hour on 2 CPU cores
#   bash scripts/fairseq_tests.sh CHECKOUT -k TestDataset   what is given to pytest
#
# CHECKOUT is a clone of https://github.com/facebookresearch/fairseq; its tests run with the fairseq that is installed.
# The outcomes go to runs/fairseq_tests/. Exit code 1: a test passes without the plugin and not with it.
set -euo pipefail
checkout=$(cd "${1:?give a clone of https://github.com/facebookresearch/fairseq}" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENV=requirements-dev.txt
source scripts/env.sh

root=$PWD out=$PWD/runs/fairseq_tests place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
mkdir -p "$out"
# Not fairseq itself: Python would take it instead of the installed one.
cp -r "$checkout/tests" "$checkout/examples" "$checkout/scripts" "$place"
cd "$place"

# GPUs, speech and the network are left out; xformers is not installed.
left_out=(--ignore tests/gpu --ignore tests/speech --ignore tests/speech_recognition --ignore tests/test_hf_hub.py
  --deselect tests/test_multihead_attention.py::test_xformers_single_forward_parity)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=

outcomes() { # NAME [OPTION ...]
  local name=$1
  shift
  python -m pytest tests "${left_out[@]}" -p no:cacheprovider --continue-on-collection-errors \
    --junitxml "$out/$name.xml" "$@" >"$out/$name.log" 2>&1 || [ $? -eq 1 ]
  tail -n 1 "$out/$name.log"
}

echo "without the plugin (log: $out/without.log)"
# Without the variable, torch >= 2.6 refuses every checkpoint that stock fairseq writes.
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 outcomes without "$@"
echo "with it (log: $out/with.log)"
PYTHONPATH=$root outcomes with -p xmoe_fairseq "$@"
python "$root/scripts/compare_outcomes.py" "$out/without.xml" "$out/with.xml"
