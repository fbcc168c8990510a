#!/usr/bin/env bash
# The demonstration, from nothing: installs into .venv (see scripts/install.sh), then a small trained Llama answers 32
# prompts as a pipeline of heterogeneous stages. On CPU processes; on the GPUs of this machine where there are any.
# Arguments go to `ds-llmpq run`: ./launch/quickstart.sh quant.bits=[4,8]
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
venv=$(./scripts/install.sh "$([ "$gpus" = 0 ] && echo cpu || echo cuda)")
export PATH="$venv/bin:$PATH"
installed=$SECONDS
out=runs/quickstart/$(date +%Y-%m-%d_%H-%M-%S)

if [ "$gpus" = 0 ]; then
  ds-llmpq run +experiment=demo "out=$out" "$@"
else
  ds-llmpq detect "out=$out/cluster"
  ds-llmpq run +experiment=demo "cluster_file=$out/cluster/cluster.yaml" "out=$out" "$@"
fi
echo "the demonstration took $((SECONDS - installed)) s, after $installed s of installation"
