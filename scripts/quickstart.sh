#!/usr/bin/env bash
# From text to scores on the CPU, with a tiny model and the bundled sample:
# convert, train, evaluate on held-out questions, score a few answers.
#   bash scripts/quickstart.sh
# The results replace those of an earlier quickstart when they are whole.
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
[ $# = 0 ] || { echo "error: found '$*', expected no argument, or --help" >&2; exit 2; }
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

example=$root/examples/glm4_reward_model_train
config=$root/model_configs/glm_config/run_glm4_tiny_rm_cpu.yaml
sample=$example/sample_data
run=$example/output/quickstart new=$example/output/.quickstart.new old=$example/output/.quickstart.old
mkdir -p "$example/output"
exec 8>"$example/output/.quickstart.lock"
flock -n 8 || { echo "error: another quickstart is running in $example/output" >&2; exit 1; }
[ -e "$run" ] || [ ! -e "$old" ] || mv "$old" "$run"  # of one that was killed, as is the next
rm -rf "$new"
mkdir -p "$new/logs"
cd "$new"

into() { # LOG COMMAND...
  "${@:2}" >"$1" 2>&1
}

step() { # TITLE NAME COMMAND...: run it with its output in logs/NAME.log
  local title=$1 log=logs/$2.log begin=$SECONDS code=0
  shift 2
  echo "== $title"
  endable into "$log" "$@" || code=$?
  case $code in
    0) ;;
    129 | 130 | 143) echo "error: stopped; an earlier quickstart's results are as they were" >&2 && exit "$code" ;;
    *)
      tail -n 20 "$log" >&2
      echo "error: this step failed; all of its output is in $new/$log" >&2
      exit 1
      ;;
  esac
  echo "   $((SECONDS - begin)) s"
}

convert() {
  python "$example/cvalues_comparison.py" --tokenizer "$sample/tokenizer.model" --src_file "$sample/$1.jsonl" \
    --dst_file "$1.mindrecord" --seq_length 128 --keep pos_type,neg_type
}

train() { # all lines go to the log, every twentieth step to the terminal
  python "$example/reward_train.py" --config "$config" --train_dataset train.mindrecord \
    --eval_dataset test.mindrecord --set eval_at_start=True 2>&1 | tee logs/train.log |
    awk 'match($0, /step [0-9]+ of .*/) { if (++n % 20 == 1) { print "   " substr($0, RSTART); fflush() } }' >&3
}

exec 3>&1
step "convert the training pairs" convert_train convert train
step "convert the held-out pairs (none of their questions is in the training set)" convert_test convert test
step "train a tiny GLM-4 reward model" train train
step "evaluate on the held-out pairs" eval python "$example/reward_eval.py" --config "$config" \
  --eval_dataset test.mindrecord --batch_size 16 --distributed_ckpt_path output/checkpoint_network \
  --group_by pos_type,neg_type
head -n 2 "$sample/test.jsonl" >ask.jsonl
step "score a few answers" infer python "$example/reward_infer.py" --config "$config" --data_file ask.jsonl \
  --tokenizer "$sample/tokenizer.model" --distributed_ckpt_path output/checkpoint_network

echo
python - <<'PY'
import json
for line in open("output/scores.jsonl", encoding="utf-8"):
    row = json.loads(line)
    print(f"问题：{row['prompt']}")
    for side in ("pos", "neg"):
        print(f"  {row[side + '_score']:8.3f}  {row[side + '_resp']}")
PY
echo
echo "held-out: $(sed -n 's/.*: \([0-9]* pairs, accuracy .*\)/\1/p' logs/eval.log | tail -n 1)"
python - <<'PY'
import json
for group, figures in json.load(open("output/eval.json", encoding="utf-8"))[0]["groups"].items():
    print(f"  {figures['accuracy']:.4f}  {group} ({figures['pairs']} pairs)")
PY
trap '' INT TERM HUP  # the names change together
rm -rf "$old"
[ ! -e "$run" ] || mv "$run" "$old"
mv "$new" "$run"
rm -rf "$old"
echo
cat <<TEXT
all of it is in ${run#"$root/"}:
  output/checkpoint_network  the trained weights
  output/checkpoint          weights with optimizer state, to resume from
  output/curves.png          loss, accuracy, margin, learning rate and gradient norm over the steps, held-out beside
  output/metrics.csv         the same as figures, those of the held-out pairs in eval.csv
  output/eval.json           the figures of the evaluation
  output/eval_*.png          the distributions of the held-out scores, and accuracy by group
  output/scores.jsonl        the scored answers
  logs                       all that was printed
TEXT
