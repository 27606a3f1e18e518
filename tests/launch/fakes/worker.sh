#!/usr/bin/env bash
# The programs of a TPU VM that need the network, a TPU or root. Which one this is, its file name says.
# $FAKE_WORLD/scenario.sh sets: run (what a run does: wait, finish, "finish second time", fail, deaf), chips (of each
# worker; empty: no answer), all_chips (what each of them sees), no_network, mount_in_use.
set -eu
run='' all_chips='' chips=() no_network='' mount_in_use='' HF_TOKEN=${HF_TOKEN-}
# shellcheck source=/dev/null
source "$FAKE_WORLD/scenario.sh"
name=${0##*/}

wrong() {
  echo "$name: $1: $arguments" >&2
  exit 2
}
arguments=$*

# Nothing outside the test's own folder is touched.
inside() { [[ $1 == "${FAKE_WORLD%/*}"/* ]] || wrong "outside of the sandbox"; }

record() { echo "$name $arguments" >>"$HOME/programs"; }

program() {
  mkdir -p "$(dirname "$1")"
  cp "$FAKE_WORLD/worker_bin/gcsfuse" "$1"
}

# The folder is a link to the bucket from the start: all workers of the test are one machine.
mount_at() {
  inside "$2"
  [ ! -f "$HOME/mounted" ] || wrong "something is mounted already"
  echo "$1 $2" >"$HOME/mounted"
}

# A run in small: says what it was called with, counts steps, saves when it is told to stop.
supervise() {
  local word workdir='' state
  while [ "$1" != -- ]; do
    [[ $1 == --max_restarts=* ]] || wrong "unknown flag"
    shift
  done
  [ "$3 $4 $5" = "-m vflax.launch --distributed" ] || wrong "not the launcher"
  [ -f pyproject.toml ] || wrong "not where the checkout is"
  for word in "$@"; do
    [[ $word != --workdir=* ]] || workdir=${word#--workdir=}
  done
  tell() { [ "$FAKE_WORKER" != 0 ] || printf '{\n "state": "%s",\n "step": 3\n}' "$1" >"$workdir/status.json"; }
  if [ "$run" = deaf ]; then trap '' TERM; else trap 'tell preempted; echo saved; exit 75' TERM; fi
  mkdir -p "$workdir"
  echo "slices ${MEGASCALE_NUM_SLICES-none}"
  echo "VFLAX_CACHE ${VFLAX_CACHE-none}, HF_TOKEN of ${#HF_TOKEN} characters"
  echo "$FAKE_WORKER" >>"$workdir/started.$FAKE_WORKER"
  echo "step 1"
  tell running
  state=$run
  if [ "$run" = "finish second time" ] && [ "$(wc -l <"$workdir/started.$FAKE_WORKER")" -gt 1 ]; then state=finish; fi
  case $state in
    finish)
      mkdir -p "$workdir/export"
      echo '{}' >"$workdir/export/config.json"
      tell "done"
      ;;
    fail) echo "error: no such file" && exit 1 ;;
    *) while :; do sleep 0.05; done ;;
  esac
}

case $name in
  curl)
    [ "$*" = "-sf -m 5 -H Metadata-Flavor: Google http://metadata.google.internal/computeMetadata/v1/instance/\
attributes/agent-worker-number" ] || wrong "not the worker's number"
    printf %s "$FAKE_WORKER"
    ;;
  sudo)
    record
    [[ "$*" == *"${FAKE_WORLD%/*}"/* ]] || wrong "outside of the sandbox"
    exec "$@"
    ;;
  mountpoint) [ "$1" = -q ] && [ -f "$HOME/mounted" ] && [ "$(cut -d' ' -f2 "$HOME/mounted")" = "$2" ] ;;
  findmnt)
    [ "$1 $2 $3 $4" = "-n -o SOURCE --mountpoint" ] || wrong "unknown"
    [ -f "$HOME/mounted" ] && [ "$(cut -d' ' -f2 "$HOME/mounted")" = "$5" ] || exit 1
    cut -d' ' -f1 "$HOME/mounted"
    ;;
  umount)
    record
    [ -z "$mount_in_use" ] || wrong "target is busy"
    rm "$HOME/mounted"
    ;;
  python3) # the image's Python 3.10: it can fetch uv
    record
    [ "$*" = "-m pip install -q --user uv" ] || wrong "Python 3.10 is too old for this"
    [ -z "$no_network" ] || wrong "no network"
    program "$HOME/.local/bin/uv"
    ;;
  uv)
    record
    if [ "$1 $2 $3 $4" = "venv -q --allow-existing --python" ]; then
      program "$6/bin/python"
      echo "$5" >"$6/version"
    else
      [ "$1 $2 $3 $4 $6 $7" = "pip install -q --python --torch-backend=cpu -e" ] || wrong "unknown"
      [[ -f ${8%"[tpu,torch]"}/pyproject.toml ]] || wrong "no project there"
    fi
    ;;
  gcsfuse)
    record
    while [ $# -gt 2 ]; do
      case $1 in
        --implicit-dirs | --metadata-cache-ttl-secs=* | --metadata-cache-negative-ttl-secs=* | --rename-dir-limit=*) ;;
        *) wrong "unknown flag $1" ;;
      esac
      shift
    done
    [[ $1 != */* && -d $FAKE_WORLD/buckets/$1 ]] || wrong "no such bucket"
    mount_at "$1" "$2"
    ;;
  mount | mount.nfs)
    record
    [ "$1 $2 $3 $4" = "-t nfs -o hard" ] || wrong "unknown"
    mount_at "$5" "$6"
    ;;
  python) # of the virtual environment
    case $* in
      --version) echo "Python 3.12.7" ;;
      */launch/check_devices.py)
        [ -n "${chips[FAKE_WORKER]}" ] || exit 124
        echo "chips ${chips[FAKE_WORKER]} of $all_chips, TPU v4, Python 3.12.7, jax 0.8.2"
        ;;
      "-m vflax.supervise "*) supervise "${@:3}" ;;
      *) wrong "unknown" ;;
    esac
    ;;
  *) wrong "unknown" ;;
esac
