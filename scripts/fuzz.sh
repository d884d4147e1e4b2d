#!/usr/bin/env bash
# Fuzzing at full length, one to two hours a seed: 5,000 input lines, 1,000 YAMLs, 500 checkpoints, 500 MindRecord data
# sets, mutated; at random moments 150 signals, 120 full disks, and 132 second scripts beside a first (those alone:
# --seed N -k signals, -k full_disk, -k two_at_once). Prints how many were accepted and refused; the exit code is 0 when
# nothing was found.
#   bash scripts/fuzz.sh [SEEDS]                   seeds 0, 1, ... (default: 1, which is seed 0)
#   bash scripts/fuzz.sh --seed N [pytest's own options]
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

number() { # WHAT LEAST TEXT
  [[ $3 =~ ^[0-9]{1,9}$ ]] && [ "$3" -ge "$2" ] ||
    { echo "error: $1: found '$3', expected a whole number, $2 or more" >&2; exit 1; }
}

if [ "${1:-}" = --seed ]; then
  number --seed 0 "${2:-}"
  seeds=("$2")
  shift 2
else
  number SEEDS 1 "${1:-1}"
  mapfile -t seeds < <(seq 0 $((${1:-1} - 1)))
  shift $(($# > 0 ? 1 : 0))
fi
export FUZZ_FULL=1 FUZZ_SUMMARY
FUZZ_SUMMARY=$(mktemp)
trap 'rm -f "$FUZZ_SUMMARY"' EXIT
failed=()
for seed in "${seeds[@]}"; do
  echo "== seed $seed"
  FUZZ_SEED=$seed endable python -m pytest --long tests/fuzz "$@" || failed+=("$seed")
done
echo
python - "$FUZZ_SUMMARY" <<'PY'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
print(f"{'seed':>6}  {'what':<12} {'seconds':>8}  outcomes")
for row in rows:
    test, seed, seconds = row.pop("test"), row.pop("seed"), row.pop("seconds")
    print(f"{seed:>6}  {test:<12} {seconds:>8}  " + ", ".join(f"{count:,} {what}" for what, count in sorted(row.items())))
PY
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: found something with seed ${failed[*]}, see above; add it to the test as an @example" >&2
  exit 1
fi
echo "no traceback, no hang, no wrong success, but for old data: MindRecord alone judges what has no checksums"
