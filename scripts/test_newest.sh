#!/usr/bin/env bash
# What a maintainer runs weekly: installs the newest release of every library, in range or not, into .venv-beyond, and
# says what breaks. Ends with the versions that are outside the ranges of ds_llmpq/versions.py; its status is that of the
# tests, so a green run means that the ranges may be widened.
#   TORCH=2.14.1   another torch than that of the lock: the newest is a GPU build of 3 GB in most indexes
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/test_environment.sh

venv=$(VENV=.venv-beyond ./scripts/install_newest.sh any)
export PATH="$venv/bin:$PATH" DS_LLMPQ_ANY_VERSION=1
failed=0
python -m pytest -q -rs -m "not (slow or netns)" "$@" || failed=1
python scripts/versions_in_use.py --outside
exit $failed
