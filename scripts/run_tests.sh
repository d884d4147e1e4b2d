#!/usr/bin/env bash
# Set up the environment of a pair of releases if need be, then the style check and all tests.
#   [PAIR=...] [WORKERS=N] bash scripts/run_tests.sh [--quick | --long] [pytest's own options: a file, -k padding, ...]
# --quick leaves out the tests that start processes, and further cases; --long adds those that repeat others at length.
# The files are divided among WORKERS processes (0: none beside this one). Many tests wait for a process that they have
# started, so there are two workers more than cores, at most 4; with --quick as many as cores.
# With PAIR=newest and no options: the pipeline from text to scores, and what depends on the releases most.
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
endable ruff check .
if [ "${PAIR:-}" = newest ] && [ $# = 0 ]; then
  set -- tests/test_end_to_end.py tests/compat tests/checkpoints/test_save.py tests/training/test_resume.py \
    tests/training/test_start_from.py tests/parallel/test_layouts.py
fi
cores=$(nproc)
workers=$((cores < 2 ? cores + 2 : 4))
case " $* " in *" --quick "*) workers=$((cores < 4 ? cores : 4)) ;; esac
endable python -m pytest -n "${WORKERS:-$workers}" --dist loadfile --no-loadscope-reorder "$@"
