#!/usr/bin/env bash
# Makes the exact versions in requirements/ anew from the ranges in ds_llmpq/versions.py: what a maintainer runs after
# changing a range, or to take newer releases. Needs uv (pip install uv).
#   scripts/lock.sh              keeps what is locked where the ranges allow it
#   scripts/lock.sh --upgrade    takes the newest releases that the ranges allow
#
# Requirement files, because pip reads them and every Python has pip. Each is valid on Python 3.10 to 3.13 (a line's
# marker says where it applies) and complete: scripts/install.sh installs them without resolving anything.
#   build.txt    pip and what builds packages that come as source
#   cpu.txt      the package with its extra `cpu`
#   cuda.txt     the package with its extra `gpu`, and the CUDA libraries of PyPI's torch
#   dev.txt      what tests need
#   torch.txt    torch alone: no hash, since every index serves another build of it
#   lowest.txt   the lowest versions that the ranges allow, for scripts/test_ends.sh; on Python 3.11
set -euo pipefail
cd "$(dirname "$0")/.."

compile() { # compile OUTPUT [OPTION ...]
  local output=$1
  shift
  uv pip compile --quiet --no-header --no-annotate "$@" --output-file "requirements/$output"
}
locked=(--universal --python-version 3.10 --generate-hashes)

uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.10 --no-deps - \
  --output-file requirements/torch.txt "${@}" <<<"$(python3 -c 'from ds_llmpq.versions import REQUIREMENTS as r; print("torch" + r["torch"])')"
# the CUDA libraries that torch asks for belong to its CUDA build alone
mapfile -t cuda < <(uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.10 requirements/torch.txt |
  sed -nE 's/^((nvidia|cuda)-[a-z0-9-]+|triton)==.*/\1/p' | sort -u)
without_torch=(--no-emit-package torch --constraints requirements/torch.txt)
without_cuda=("${without_torch[@]}")
for name in "${cuda[@]}"; do without_cuda+=(--no-emit-package "$name"); done

compile dev.txt "${locked[@]}" "${without_cuda[@]}" --extra dev setup.py "$@"
compile cpu.txt "${locked[@]}" "${without_cuda[@]}" --extra cpu setup.py --constraints requirements/dev.txt
compile cuda.txt "${locked[@]}" "${without_torch[@]}" --extra gpu setup.py --constraints requirements/dev.txt
compile build.txt "${locked[@]}" - --constraints requirements/dev.txt <<<$'pip\nsetuptools\nwheel' "$@"
rm -f requirements/lowest.txt # uv would keep what it holds
compile lowest.txt --resolution lowest-direct --python-version 3.11 --python-platform linux "${without_cuda[@]:0:2}" \
  $(printf -- '--no-emit-package %s ' "${cuda[@]}") --extra dev setup.py
# their notes name packages that are left out, which every file would repeat
sed -i '/^# The following packages were excluded/,$d' requirements/{dev,cpu,cuda,lowest}.txt
wc -l requirements/*.txt
