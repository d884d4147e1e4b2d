#!/usr/bin/env bash
# Set up .venv if need be, then the style check and all tests.
#   bash scripts/run_tests.sh [pytest's own options, for instance tests/test_loss.py or -k padding]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
ruff check .
exec python -m pytest "${@:-tests}"
