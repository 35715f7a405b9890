#!/usr/bin/env bash
# Prepares a benchmark from nothing to binary files that training reads: the command `xmoe prepare`.
#
#   bash data_prep/prepare.sh --benchmark demo4 --out DIR
#   bash data_prep/prepare.sh --benchmark local --input FOLDER --out DIR [--vocab-size N] [--lang-pairs fr-en,en-de]    see docs/data.md
#   bash data_prep/prepare.sh --benchmark m4|m15|opus100 [--source NAME,...] --out DIR    see docs/benchmarks.md
#
# It may be started from any folder, and again with the same options after an interruption: what is finished stays.
# PYTHON names the interpreter to use (default: python). All options: bash data_prep/prepare.sh --help
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# The package is found next to this folder, whether it was installed or not.
export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}"
exec "${PYTHON:-python}" -m xmoe_fairseq prepare "$@"
