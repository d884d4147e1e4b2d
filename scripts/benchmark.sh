#!/usr/bin/env bash
# Measure conversion, training, scoring and start-up; print a table in Markdown and write it with all raw figures as JSON.
#   bash scripts/benchmark.sh [--with-peers] [--quick] [--rounds N] [--output DIR] [--parts PART,...]
# Parts: conversion, training, training-16, training-large, scoring, scoring-8, start-up. Default output: output/benchmark.
# --with-peers makes .venv-torch (once; setup.py's extra "peers") and runs transformers and TRL alternately with this
# project; without it they are measured if .venv-torch is there, or the interpreter that REFERENCE_PYTHON names.
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

options=()
for option in "$@"; do
  if [ "$option" = --with-peers ]; then
    [ -n "${REFERENCE_PYTHON:-}" ] || install_peers
  else
    options+=("$option")
  fi
done
peers=${REFERENCE_PYTHON:-$root/.venv-torch/bin/python}
if [ -n "${REFERENCE_PYTHON:-}" ] || [ -x "$peers" ]; then options+=(--peers "$peers"); fi
endable python "$root/scripts/benchmark" "${options[@]}"
