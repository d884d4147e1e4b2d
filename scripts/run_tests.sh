#!/usr/bin/env bash
# Set up the environment of a pair of releases if need be, then the style check and all tests.
#   [PAIR=production] bash scripts/run_tests.sh [pytest's own options, for instance tests/test_loss.py or -k padding]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
exec python -m pytest "$@"
