#!/usr/bin/env bash
# Make a TPU VM or pod slice where there is none, install vflax on all its hosts, run a stage on all of them.
#   launch/tpu_vm.sh NAME ZONE ACCELERATOR [flags of vflax.launch ...]
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,3p' "$0" >&2
  exit 1
fi
name=$1 zone=$2 accelerator=$3
shift 3
tpu=(gcloud compute tpus tpu-vm)
here=$(cd "$(dirname "$0")/.." && pwd)

"${tpu[@]}" describe "$name" --zone="$zone" >/dev/null 2>&1 ||
  "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$accelerator" --version="${TPU_RUNTIME:-tpu-ubuntu2204-base}"
"${tpu[@]}" scp --recurse --worker=all --zone="$zone" "$here" "$name:vflax"
"${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="python3 -m venv \$HOME/venv && \$HOME/venv/bin/pip install -q -e '\$HOME/vflax[tpu]'"
printf -v flags '%q ' "$@"
"${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="cd vflax && \$HOME/venv/bin/python -m vflax.launch --distributed $flags"
