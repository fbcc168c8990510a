#!/usr/bin/env bash
# scripts/install.sh [cpu|cuda|dev]: makes .venv in the checkout, if need be, and installs there the exact versions of
# requirements/ (cpu, where nothing is named) and the package itself, editable. Done once for the same lock. Prints where
# the environment is; what pip said is in it, in install.log.
#   PYTHON=python3.12  the interpreter that makes it (3.10 to 3.13)
#   VENV=DIR           an environment elsewhere
#   LOCK=FILE          other exact versions than those of requirements/NAME.txt
#   TORCH=2.12.1       another torch than that of requirements/torch.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
name=${1:-cpu}
lock=${LOCK:-requirements/$name.txt}
torch=torch==${TORCH:-$(sed -n 's/^torch==//p' requirements/torch.txt)}

if [ ! -f "$lock" ]; then
  echo "error: there is no $lock; name one of cpu, cuda and dev." >&2
  exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null || {
    echo "error: $python is missing or not Python 3.10 to 3.13; name another one in PYTHON." >&2
    exit 1
  }
  "$python" -m venv "$venv" >&2 || {
    echo "error: $python cannot make virtual environments; install its venv module (python3-venv on Debian)." >&2
    exit 1
  }
fi

log="$venv/install.log"
pip() {
  "$venv/bin/python" -m pip "$@" >>"$log" 2>&1
}
install() {
  pip install --quiet --disable-pip-version-check --no-input "$@"
}
fail() {
  tail -n 15 "$log" >&2
  echo "error: $1 could not be installed; the lines above are the end of $log." >&2
  exit 1
}

wanted=$(cat "$lock" requirements/build.txt setup.py ds_llmpq/versions.py <(echo "$torch") | cksum)
stamp="$venv/.ds_llmpq-$name"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into $venv (minutes the first time)" >&2
  start=$SECONDS
  : >"$log"
  install --require-hashes --requirement requirements/build.txt || fail "pip"
  # A CPU's build where the indexes have one: on Linux, PyPI's is for GPUs and brings 3 GB of CUDA libraries.
  if [ "$name" = cuda ] || ! install --no-deps "$torch+cpu"; then
    [ "$name" = cuda ] || [ "$(uname -sm)" != "Linux x86_64" ] ||
      echo "no CPU build of torch in pip's indexes (PIP_EXTRA_INDEX_URL may name PyTorch's): taking PyPI's, with 3 GB of CUDA libraries" >&2
    install "$torch" || fail "$torch"
  fi
  hashes=$(grep -q -e --hash= "$lock" && echo --require-hashes || true)
  install --no-deps $hashes --build-constraint requirements/build.txt --requirement "$lock" || fail "$lock"
  install --no-deps --no-build-isolation --editable . || fail "ds_llmpq"
  echo "$wanted" >"$stamp"
  echo "installed in $((SECONDS - start)) s" >&2
fi
(cd "$venv" && pwd)
