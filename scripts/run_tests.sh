#!/usr/bin/env bash
# Set up the environment of a pair of releases if need be, then the style check and all tests.
#   [PAIR=...] bash scripts/run_tests.sh [pytest's own options, for instance tests/test_loss.py or -k padding]
# With PAIR=newest and no options: the pipeline from text to scores, and what depends on the releases most.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
if [ "${PAIR:-}" = newest ] && [ $# = 0 ]; then
  set -- tests/test_end_to_end.py tests/test_compat*.py tests/test_saving.py tests/test_resume.py \
    tests/test_starting_point.py tests/parallel/test_layouts.py
fi
exec python -m pytest "$@"
