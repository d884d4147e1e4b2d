#!/usr/bin/env bash
# Set up the environment of a pair of releases if need be, then the style check and all tests.
#   [PAIR=...] bash scripts/run_tests.sh [pytest's own options, for instance tests/models/test_objective.py or -k padding]
# With PAIR=newest and no options: the pipeline from text to scores, and what depends on the releases most.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
if [ "${PAIR:-}" = newest ] && [ $# = 0 ]; then
  set -- tests/test_end_to_end.py tests/compat tests/checkpoints/test_save.py tests/training/test_resume.py \
    tests/training/test_start_from.py tests/parallel/test_layouts.py
fi
exec python -m pytest "$@"
