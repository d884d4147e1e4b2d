#!/usr/bin/env bash
# Start a command on several processes with MindSpore's msrun. See `msrun_launcher.sh --help`.
set -euo pipefail
# What a user's shell has exported changes nothing here, and what is closed is no file of the job.
unset CDPATH BASH_ENV ENV POSIXLY_CORRECT
set +o posix +o noglob +o noclobber +o allexport
[ -e /dev/fd/0 ] || exec </dev/null
[ -e /dev/fd/1 ] || exec >/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null

usage() {
  cat <<'TEXT'
Usage, with 1, 2, 6 or 9 arguments:
  msrun_launcher.sh [--dry-run] COMMAND
  msrun_launcher.sh [--dry-run] COMMAND WORKER_NUM
  msrun_launcher.sh [--dry-run] COMMAND WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
  msrun_launcher.sh [--dry-run] COMMAND WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT

  COMMAND           a Python script with its arguments, as one argument in quotes
  WORKER_NUM        processes of the job, on all nodes              (default 8)
  LOCAL_WORKER      processes of the job on this node               (default WORKER_NUM)
  MASTER_ADDR       address of the first node                       (default 127.0.0.1)
  MASTER_PORT       port of the job on the first node               (default 8118)
  NODE_RANK         number of this node, from 0                     (default 0)
  LOG_DIR           folder for worker_0.log, scheduler.log, ...     (default output/msrun_log)
  JOIN              True: wait, print the end of worker 0's log, and exit with the workers' result; False: return at
                    once  (default False)
  CLUSTER_TIME_OUT  seconds to wait for all processes to appear     (default 7200)

  --dry-run         print msrun's command line and do nothing

  The first process that fails ends the job: worker, exit code or signal and the end of its log are printed with JOIN
  True, and are in LOG_DIR/msrun.log in any case (msrun_1.log, ... on further nodes). The last line there says how the
  job has ended.

  Ctrl-C, SIGTERM or SIGHUP to the launcher, or to one worker, ends the job with a checkpoint: workers have GRACE_SECONDS
  (environment, default 600) for it; a second Ctrl-C ends it at once. The exit code is 130, 143 or 129. The job of a
  launcher that is killed with SIGKILL is killed too.

On one node:
  bash msrun_launcher.sh "reward_train.py --config run_glm4_9b_rm.yaml --train_dataset train.mindrecord" \
    8 9123 output/msrun_log False 600
TEXT
}

fail() {
  echo "msrun_launcher.sh: error: $1" >&2
  exit 2
}

whole_number() { # NAME VARIABLE LEAST; 10#, as Bash takes 08 for an octal number
  [[ ${!2} =~ ^[0-9]{1,9}$ ]] && [ "${!2}" -ge "$3" ] || fail "$1: found '${!2}', expected a whole number from $3 up"
  printf -v "$2" %d "$((10#${!2}))"
}

dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
case ${1:-} in -h | --help) usage && exit ;; esac

workers=8 local_workers= address=127.0.0.1 port=8118 node=0 log_dir=output/msrun_log join=False time_out=7200
case $# in
  1) ;;
  2) workers=$2 ;;
  6) workers=$2 port=$3 log_dir=$4 join=$5 time_out=$6 ;;
  9) workers=$2 local_workers=$3 address=$4 port=$5 node=$6 log_dir=$7 join=$8 time_out=$9 ;;
  *) usage >&2 && fail "found $# arguments, expected 1, 2, 6 or 9" ;;
esac
local_workers=${local_workers:-$workers}
whole_number WORKER_NUM workers 1
whole_number LOCAL_WORKER local_workers 1
whole_number MASTER_PORT port 1
whole_number NODE_RANK node 0
whole_number CLUSTER_TIME_OUT time_out 1
[ "$port" -le 65535 ] || fail "MASTER_PORT: found '$port', expected at most 65535"
[ "$local_workers" -le "$workers" ] || fail "LOCAL_WORKER: found '$local_workers', expected at most WORKER_NUM ($workers)"
[ "$((node * local_workers))" -lt "$workers" ] || [ "$local_workers" -eq "$workers" ] ||
  fail "NODE_RANK: found '$node', expected at most $(((workers - 1) / local_workers)) with WORKER_NUM $workers and LOCAL_WORKER $local_workers"
# A 9B model's checkpoint is 105 GB with its optimizer's state. MindSpore documents 300, and takes 30: a busy host's end.
export GRACE_SECONDS=${GRACE_SECONDS:-600} MS_NODE_TIMEOUT=${MS_NODE_TIMEOUT:-300}
whole_number GRACE_SECONDS GRACE_SECONDS 0
[[ $join =~ ^([Tt]rue|[Ff]alse)$ ]] || fail "JOIN: found '$join', expected True or False"
join=${join^}

# The command's words, quotes respected, nothing expanded.
command=${1//$'\\\n'/ }
xargs true <<<"$command" 2>/dev/null || fail "COMMAND: found '$1', expected a script and its arguments (do the quotes match?)"
words=()
while IFS= read -r -d '' word; do words+=("$word"); done < <(xargs printf '%s\0' <<<"$command")
[ -n "${words[0]:-}" ] || fail "COMMAND: found '$1', expected a script and its arguments"
[ "${words[0]}" != python ] && [ "${words[0]}" != python3 ] || words=("${words[@]:1}")
[ -f "${words[0]:-}" ] || fail "COMMAND: ${words[0]:-}: no such file in $PWD"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v msrun >/dev/null || PATH=$root/.venv/bin:$PATH
for program in msrun python; do
  command -v $program >/dev/null || fail "$program not found: activate the environment that MindSpore is installed in"
done
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# The supervisor waits for the processes, not msrun; see there why.
line=(msrun "--worker_num=$workers" "--local_worker_num=$local_workers" "--master_addr=$address"
  "--master_port=$port" "--node_rank=$node" "--log_dir=$log_dir" --join=False "--cluster_time_out=$time_out"
  "$root/scripts/msrun_worker.py" "${words[@]}")
[ -z "$dry_run" ] || { printf '%q ' "${line[@]}" && echo && exit; }
mkdir -p "$log_dir" 2>/dev/null && [ -w "$log_dir" ] || fail "LOG_DIR: $log_dir cannot be written"
# Logs of an earlier job go; those of other nodes, whose folder may be the same, stay.
log=$log_dir/msrun.log first=0
if [ "$local_workers" -eq "$workers" ]; then
  rm -f "$log_dir"/worker_*.log "$log_dir"/msrun_*.log "$log_dir/scheduler.log"
else
  first=$((node * local_workers))
  for ((rank = first; rank < first + local_workers; rank++)); do rm -f "$log_dir/worker_$rank.log"; done
  [ "$node" -eq 0 ] && rm -f "$log_dir/scheduler.log" || log=$log_dir/msrun_$node.log
fi
: >"$log"

ulimit -u unlimited 2>/dev/null || true  # a worker has many threads; where the limit is not ours to lift, it stays
trap '' PIPE  # whoever reads this may go; the job goes on
echo "starting $local_workers of $workers processes; each logs to $log_dir/worker_*.log (tail -f $log_dir/worker_$first.log)" 2>/dev/null || true
# Until the supervisor's first line, Ctrl-C would be Python's, with a traceback: it waits, where env can have it wait.
guard=(env --block-signal=INT)
"${guard[@]}" true 2>/dev/null || guard=(env)
exec "${guard[@]}" python -I -S "$root/scripts/msrun_supervisor.py" "$join" "$log" "$log_dir" "$workers" \
  "$local_workers" "$address" "$port" "$node" "$time_out" "${line[@]}"
