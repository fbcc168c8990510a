#!/usr/bin/env bash
# scripts/install_newest.sh allowed|any: makes $VENV with the newest releases that the ranges of ds_llmpq/versions.py
# allow, or with the newest there are. Prints where it is; what pip said is in it, in install.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$(./scripts/install.sh dev) # torch, pip and build tools as locked, then everything else newer
log="$venv/install.log"
torch=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')
"$venv/bin/python" scripts/versions_in_use.py "--$1" >"$venv/newest.txt"
echo "torch==${TORCH:-$torch}" >"$venv/torch.txt"
"$venv/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager --constraint "$venv/torch.txt" \
  --requirement "$venv/newest.txt" >>"$log" 2>&1 || {
  tail -n 15 "$log" >&2
  echo "error: the newest versions could not be installed; the lines above are the end of $log." >&2
  exit 1
}
echo "$venv"
