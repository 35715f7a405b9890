#!/usr/bin/env bash
# Runs every check: lint, types, and the tests in three tiers (unit, integration, slow). GPU tests need -m gpu.
#
#   bash scripts/test.sh                  everything
#   bash scripts/test.sh tests/unit -x    what is given to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENV=requirements-dev.txt
source scripts/env.sh

ruff check .
ruff format --check .
mypy
# Two processes of one thread each: the models are tiny, and waiting threads would only take each other's time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest --numprocesses 2 --dist worksteal "${@:-tests}"
