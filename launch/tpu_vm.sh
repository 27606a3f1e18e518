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
root=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp --suffix=.tar)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --output="$archive" HEAD

"${tpu[@]}" describe "$name" --zone="$zone" >/dev/null 2>&1 ||
  "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$accelerator" --version="${TPU_RUNTIME:-tpu-ubuntu2204-base}"
"${tpu[@]}" scp --worker=all --zone="$zone" "$archive" "$name:vflax.tar"
# The runtime's own Python may be older than 3.11; uv brings one that is not.
install='rm -rf vflax && mkdir vflax && tar xf vflax.tar -C vflax
python3 -m pip install -q --user uv
python3 -m uv venv -q --allow-existing --python 3.12 venv && python3 -m uv pip install -q --python venv/bin/python "./vflax[tpu]"'
"${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="$install"
printf -v flags '%q ' "$@"
"${tpu[@]}" ssh "$name" --zone="$zone" --worker=all --command="venv/bin/python -m vflax.launch --distributed $flags"
