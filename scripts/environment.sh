# Sourced by quickstart.sh, run_tests.sh and their like: answers signals, makes a virtual environment with the project
# in it, once, and puts it first in PATH. setup.py alone says what is installed.
#   PAIR    which releases of MindSpore and MindFormers: current (default; in .venv), production (in .venv-production) or
#           newest (in .venv-newest)
#   PYTHON  the interpreter; without it, one that fits the pair is looked for

# What a user's shell has exported changes nothing here.
unset CDPATH BASH_ENV ENV POSIXLY_CORRECT
set +o posix +o noglob +o noclobber +o allexport
[ -e /dev/fd/0 ] || exec </dev/null
[ -e /dev/fd/1 ] || exec >/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NO_PYTHON=3  # exit code where no interpreter fits

# Bash answers a signal only when the command that it runs has ended. So what takes long runs beside it, and a signal
# goes on to all that came of it: whatever has this mark in its environment, also in sessions of its own.
mark=MINDRLHF_SCRIPT=$$-$RANDOM$RANDOM child=
export "${mark?}"

endable() { # COMMAND...: run it, and let a signal to this script end it too
  local code=0
  (trap - INT && "$@") <&0 & # Bash would have it ignore Ctrl-C
  child=$!
  wait "$child" || code=$?
  child=
  return "$code"
}

marked() { # the processes with the mark, one a line
  MINDRLHF_SCRIPT='' grep -lzsxF "$mark" /proc/[0-9]*/environ | MINDRLHF_SCRIPT='' sed 's/[^0-9]//g'
}

stop() { # SIGNAL: pass it on, wait until all have ended, and end; those that take too long are killed
  local pid left stat told deadline=$((SECONDS + 30))
  trap 'deadline=-1' INT TERM HUP # a second one: at once
  read -ra stat <"/proc/$$/stat"
  mapfile -t left < <(marked)
  told=" "
  if [ "$1" = INT ] && [ "${stat[4]}" = "${stat[7]}" ]; then # Ctrl-C at a terminal has reached them
    told+="$child ${left[*]} "
  elif [ -n "$child" ]; then
    kill -s "$1" "$child" && told+="$child " || true
  fi 2>/dev/null
  disown -a
  while [ ${#left[@]} -gt 0 ]; do
    for pid in "${left[@]}"; do
      if [ "$SECONDS" -gt "$deadline" ]; then
        kill -KILL "$pid" || true
      elif [[ $told != *" $pid "* ]]; then
        kill -s "$1" "$pid" || true
        told+="$pid "
      fi
    done 2>/dev/null
    sleep 0.1 || true
    mapfile -t left < <(marked)
  done
  echo "${0##*/}: stopped by SIG$1" >&2
  exit $((128 + $(kill -l "$1")))
}
for signal in INT TERM HUP; do trap "stop $signal" "$signal"; done

case ${PAIR:-current} in
  current) venv=$root/.venv extra=cpu pythons="3.11 3.10 3.12 3.9" ;;
  production) venv=$root/.venv-production extra=production pythons="3.10" ;;
  newest) venv=$root/.venv-newest extra=newest pythons="3.11 3.10" ;;
  *)
    echo "error: PAIR: found '$PAIR', expected current, production or newest" >&2
    exit 2
    ;;
esac

runs() { # COMMAND: whether it is a Python of the pair, and starts (a shim of pyenv may not)
  [ -n "$1" ] && "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] not in '$pythons'.split())" 2>/dev/null
}

find_python() {
  local version candidate
  if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" && echo "$PYTHON" && return 0
    echo "error: PYTHON: found '$PYTHON', expected an interpreter of Python ${pythons// / or }" >&2
    return 2
  fi
  for version in $pythons; do
    for candidate in "python$version" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python \
      "$(uv python find "$version" 2>/dev/null)"; do
      runs "$candidate" && echo "$candidate" && return
    done
  done
  for candidate in python3 python; do
    runs "$candidate" && echo "$candidate" && return
  done
  echo "error: no Python ${pythons// / or } found (the releases of MindSpore need it); set PYTHON=/path/to/python" >&2
  return "$NO_PYTHON"
}

packages_of() { # EXTRA: what an extra of the installed project lists, one a line
  "$venv/bin/python" -c '
import sys
from importlib.metadata import requires
print("\n".join(line.split(";")[0] for line in requires("mindrlhf") if line.endswith(f"extra == \"{sys.argv[1]}\"")))
' "$1"
}

# MindFormers of the newest pair, without what it asks for and no registry has; the rest is in its extra.
install_newest() {
  local packages
  packages=$(packages_of nodeps) &&
    endable xargs -d '\n' "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps <<<"$packages"
}

# Whether an environment is one that an earlier release began and did not stamp: made by its very command, which venv
# notes from Python 3.11 on, with nothing in it that is a user's. What pip was asked for by name has a file REQUESTED.
begun_by_earlier_release() { # FOLDER
  [ ! -L "$1" ] && [ -f "$1/pyvenv.cfg" ] && [[ $(<"$1/pyvenv.cfg")$'\n' == *" -m venv --clear $1"$'\n'* ]] || return
  (
    cd "$1" && others=$(
      find . -mindepth 1 -maxdepth 1 ! -name bin ! -name include ! -name 'lib*' ! -name pyvenv.cfg ! -name share &&
        find lib -name REQUESTED ! -path '*/pip-[0-9]*' ! -path '*/setuptools-[0-9]*' ! -path '*/mindrlhf-[0-9]*'
    ) && [ -z "$others" ]
  )
}

# A folder for an environment: a new one, or one that we made, emptied. Its stamp says that it is ours, and what is in it.
make_room() { # FOLDER
  local stamp=$1/.installed
  if [ ! -e "$1" ] && [ ! -L "$1" ]; then
    mkdir -p "$1" || return
  # A link may lead to an environment that another checkout uses.
  elif ! { [ -f "$stamp" ] && { [ ! -L "$1" ] || [[ $(cat "$stamp") == "$root "* ]]; }; } &&
    ! begun_by_earlier_release "$1"; then
    echo "error: $1: found something that was not made here, expected nothing, or an environment of this checkout:" \
      "move it away, or remove it" >&2
    return 1
  fi
  echo "$root unfinished" >"$stamp"
  find "$1/" -mindepth 1 -maxdepth 1 ! -name .installed -exec rm -rf {} +
}

install_project() {
  local stamp=$venv/.installed wanted python version
  wanted="$root $(cksum <"$root/setup.py")"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    [ -n "${PYTHON:-}" ] || return 0
    python=$(find_python) || return
    version='import sys; print("%d.%d" % sys.version_info[:2])'
    version="$("$python" -c "$version") $("$venv/bin/python" -c "$version")"
    [ "${version% *}" = "${version#* }" ] && return
    echo "error: PYTHON: found '$PYTHON' (Python ${version% *}), expected Python ${version#* } as in $venv: leave PYTHON" \
      "unset, or remove $venv first" >&2
    return 2
  fi
  python=$(find_python) || return
  make_room "$venv" || return
  echo "== installing into ${venv##*/} (once; some 4 GB on the disk, a few minutes)"
  endable "$python" -m venv "$venv" ||
    { echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; return 1; }
  endable "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[$extra,dev]" &&
    { [ "$extra" != newest ] || install_newest; } ||
    { echo "error: the installation failed, see above; run the command again to retry" >&2; return 1; }
  echo "$wanted" >"$stamp"
}

# An environment of its own for what the project is compared with: setup.py's extra "peers".
install_peers() {
  local peers=$root/.venv-torch wanted packages
  wanted="$root $(cksum <"$root/setup.py")"
  [ "$(cat "$peers/.installed" 2>/dev/null)" = "$wanted" ] && return
  "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: PyTorch and TRL of these releases need Python 3.11: rm -r .venv, then PYTHON=python3.11" >&2; return 1; }
  echo "== installing PyTorch, transformers and TRL into .venv-torch (once; some GB on the disk)"
  packages=$(packages_of peers)
  make_room "$peers" || return
  endable "$venv/bin/python" -m venv "$peers" &&
    endable xargs -d '\n' "$peers/bin/python" -m pip install --quiet --disable-pip-version-check <<<"$packages" ||
    { echo "error: the installation failed, see above; run the command again to retry" >&2; return 1; }
  echo "$wanted" >"$peers/.installed"
}

install_project || exit
export PATH=$venv/bin:$PATH
export GLOG_v=${GLOG_v:-3}  # MindSpore's C++ side: errors only
