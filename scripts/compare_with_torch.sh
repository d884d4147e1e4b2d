#!/usr/bin/env bash
# Compare with PyTorch, transformers and TRL live: makes .venv-torch for them (once; setup.py's extra "peers" says
# which releases), then runs the tests that have reference values, with values made anew.
#   bash scripts/compare_with_torch.sh [pytest's own options]
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_peers
cd "$root"
export REFERENCE_PYTHON=$root/.venv-torch/bin/python
[ $# -gt 0 ] || set -- --long tests/models tests/huggingface tests/training/test_training_curve.py tests/data/test_formats.py
endable python -m pytest "$@"
