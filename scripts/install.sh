#!/usr/bin/env bash
# scripts/install.sh [EXTRA ...]: makes .venv in the checkout, if need be, and installs the package there, editable, with
# the extras named (dev, gpu). Done once for the same setup.py. Prints where the environment is.
#   PYTHON=python3.12  the interpreter that makes it (3.10 or later)
#   VENV=DIR           an environment elsewhere
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
extras=$(IFS=,; echo "$*")

if [ ! -x "$venv/bin/python" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $python is missing or older than Python 3.10; name another one in PYTHON." >&2
    exit 1
  }
  "$python" -m venv "$venv" >&2 || {
    echo "error: $python cannot make virtual environments; install its venv module (python3-venv on Debian)." >&2
    exit 1
  }
fi

stamp="$venv/.ds_llmpq-${extras//,/-}"
if ! cmp -s setup.py "$stamp"; then
  echo "installing into $venv (minutes the first time)" >&2
  start=$SECONDS
  # torch first and by name: others would otherwise pull in whichever version they like
  "$venv/bin/python" -m pip install --quiet torch==2.13.0 >&2
  "$venv/bin/python" -m pip install --quiet --editable ".${extras:+[$extras]}" >&2
  cp setup.py "$stamp"
  echo "installed in $((SECONDS - start)) s" >&2
fi
(cd "$venv" && pwd)
