#!/usr/bin/env bash
# Tests both ends of the ranges in ds_llmpq/versions.py, each in an environment of its own:
#   scripts/test_ends.sh lowest    the lowest versions, from requirements/lowest.txt, into .venv-lowest (Python 3.11)
#   scripts/test_ends.sh newest    the newest that the ranges allow today, into .venv-newest
#   scripts/test_ends.sh           one after the other
# Runs what touches other libraries: contracts, token identity with every model family, kernels, profile, sensitivity,
# and the demonstration through the real launcher.
#   TORCH=2.11.0   the torch of the lowest environment. By default that of the lock: a CPU build of another release is not
#                  in every index, and the GPU build is 3 GB.
#   PYTEST_ARGS    further arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/test_environment.sh

test_end() { # test_end NAME VENV
  export PATH="$2/bin:$kept_path"
  echo "== $1 versions: $(python scripts/versions_in_use.py)"
  rm -rf "runs/ends/$1"
  ds-llmpq run +experiment=demo "out=runs/ends/$1" >"$2/demo.log" 2>&1 || {
    tail -n 20 "$2/demo.log" >&2
    return 1
  }
  [ "$(wc -l <"runs/ends/$1/results.jsonl")" = 32 ] || return 1
  echo "== the demonstration answered 32 of 32"
  # shellcheck disable=SC2086
  python -m pytest -q -rs --durations=5 -m "not (slow or launcher or netns)" ${PYTEST_ARGS:-} "${subset[@]}"
}

kept_path=$PATH
subset=(tests/contracts tests/test_versions.py tests/engine/test_identity.py tests/engine/test_graph_pipeline.py tests/models
  tests/quant/test_loaded_kernels.py tests/quant/test_stage_graph.py tests/quant/test_hqq.py tests/profiling tests/sensitivity
  tests/commands/test_quality_commands.py)
failed=0
for end in "${@:-lowest newest}"; do
  for name in $end; do
    case $name in
      lowest) venv=$(VENV=.venv-lowest LOCK=requirements/lowest.txt ./scripts/install.sh dev) ;;
      newest) venv=$(VENV=.venv-newest ./scripts/install_newest.sh allowed) ;;
      *) echo "error: there is no end $name; name lowest or newest." >&2 && exit 1 ;;
    esac
    test_end "$name" "$venv" || failed=1
  done
done
exit $failed
