#!/usr/bin/env bash
# Installs what the tests need into .venv (see scripts/install.sh) and runs them all; arguments go to pytest:
#   ./scripts/test.sh                  lint, fast tests, then those that start processes or take longer
#   ./scripts/test.sh -k name          only the tests chosen
set -euo pipefail
cd "$(dirname "$0")/.."

# The test of two hosts needs an ssh server, pdsh and ip, that of completion zsh and fish. In a container they are
# installed where that is possible; on a running system they are not, since installing a server there would also start it.
missing() { ! command -v "$1" >/dev/null && [ ! -x "/usr/sbin/$1" ]; }
if { missing pdsh || missing sshd || missing ip || missing zsh || missing fish; } && [ "$(id -u)" = 0 ] &&
  [ ! -d /run/systemd/system ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  packages="pdsh openssh-server iproute2 zsh fish"
  # shellcheck disable=SC2086
  (timeout 120 apt-get update && timeout 180 apt-get install -y --no-install-recommends $packages) \
    >/dev/null 2>&1 </dev/null || echo "$packages could not be installed" >&2
fi

venv=$(./scripts/install.sh dev)
export PATH="$venv/bin:$PATH"
. scripts/test_environment.sh

if (($#)); then
  exec python -m pytest "$@"
fi
# Whatever fails, all of it is run and said. The tests that start processes wait for them most of the time; the fast ones
# take what is left of the processor meanwhile.
failed=0
slow="slow or launcher or netns"
fast_log=$(mktemp)
nice -n 10 python -m pytest -q -rs --durations=10 -m "not ($slow)" >"$fast_log" 2>&1 &
fast=$!
# A process that has ended cannot be killed, and under `set -e` that failure would become the script's own status.
trap 'kill $fast 2>/dev/null || true; rm -f "$fast_log"' EXIT
ruff check . || failed=1
ruff format --check . || failed=1
python -m pytest -q -rs --durations=25 -m "$slow" || failed=1
wait $fast || failed=1
cat "$fast_log"
echo "tests took $SECONDS s in all"
exit $failed
