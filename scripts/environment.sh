# Sourced by quickstart.sh and run_tests.sh: makes .venv with the project in it, once, and puts it first in PATH.
# PYTHON=/path/to/python chooses the interpreter (3.9 to 3.11). setup.py alone says what is installed.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.10 python3.9 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.9, 3.10 or 3.11 found (MindSpore needs one of these); set PYTHON=/path/to/python" >&2
  return 1
}

install_project() {
  local stamp=$venv/.installed wanted python
  wanted="$root $(cksum <"$root/setup.py")"
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  python=$(find_python) || return 1
  echo "== installing into .venv (once; some 4 GB on the disk, a few minutes)"
  "$python" -m venv --clear "$venv" ||
    { echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; return 1; }
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[cpu,dev]" ||
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
  packages=$("$venv/bin/python" -c '
from importlib.metadata import requires
print("\n".join(line.split(";")[0] for line in requires("mindrlhf") if line.endswith("extra == \"peers\"")))')
  "$venv/bin/python" -m venv --clear "$peers" &&
    xargs -d '\n' "$peers/bin/python" -m pip install --quiet --disable-pip-version-check <<<"$packages" ||
    { echo "error: the installation failed, see above; run the command again to retry" >&2; return 1; }
  echo "$wanted" >"$peers/.installed"
}

install_project || exit 1
export PATH=$venv/bin:$PATH
export GLOG_v=${GLOG_v:-3}  # MindSpore's C++ side: errors only
