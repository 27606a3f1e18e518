#!/usr/bin/env bash
# What tpu.sh runs on each worker (each TPU VM of a slice); nobody calls it by hand. Every line that it prints says
# which worker speaks.
#
#   worker.sh install --commit=ID [--python=3.12] [--bucket=gs://B | --nfs=HOST:/SHARE] [--mount=DIR]
#                     [--data=gs://B/FOLDER --data-dir=DIR]
#   worker.sh chips                        how many this worker has: all workers must ask at the same time
#   worker.sh mark|seen|unmark FOLDER TOKEN   is FOLDER one folder for all workers?
#   worker.sh free                         fails while a run is going
#   worker.sh start [--max-restarts=N] [--env=NAME=VALUE ...] --workdir=DIR -- FLAGS of vflax.launch
#   worker.sh status                       absent, or: running | ended STATUS | gone | idle; workdir DIR; installed FLAGS
#                                          (one line), then WORKDIR's own state
#   worker.sh log [--lines=N] [--follow]
#   worker.sh stop [--grace=SECONDS] [--kill]
#   worker.sh have FOLDER NAME ...         which of the names are in FOLDER
#
# Each takes --dry-run, which prints the commands and runs none. It asks nothing of the machine that it is on, so that
# tpu.sh can show what the workers will run: where something depends on the machine, the plan says on what.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

places() {
  base=$1
  home=$base/vflax
  src=$home/src
  python=$home/venv/bin/python
  run=$home/run
}
places "$HOME"
# Left over from another job, in a shell's start-up file, they make JAX wait for slices and hosts that are not there.
unset "${!MEGASCALE_@}" TPU_WORKER_ID TPU_WORKER_HOSTNAMES TPU_PROCESS_ADDRESSES CLOUD_TPU_TASK_ID

# The number that gcloud's --worker means, asked of the metadata server as JAX does.
worker_number() {
  curl -sf -m 5 -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo '?'
}

install() {
  local uv option flags=()
  for option in commit bucket nfs mount python data data-dir; do
    [ -z "${opt[$option]-}" ] || flags+=(--"$option=${opt[$option]}")
  done
  # What ran before ran on another installation, perhaps in another storage: its end is none of a run to come.
  plan rm -f "$home/installed" "$run"/{status,pid,boot,workdir}
  save_storage
  mount_storage
  copy_data
  uv=$(find_uv)
  plan "$uv" venv -q --allow-existing --python "${opt[python]-3.12}" "$home/venv"
  # torch reads weights that are published as .bin files (Vicuna, CLIP), on the CPU: its build for GPUs is gigabytes.
  plan "$uv" pip install -q --python "$python" --torch-backend=cpu -e "${src}[tpu,torch]"
  # Quoted twice: once for this line, once for the flags that status prints.
  plan_line "echo $(quoted "$(quoted "${flags[@]}")") >$(quoted "$home/installed")"
  dry || echo "installed ${opt[commit]} with $("$python" --version)"
}

# The image's own Python is 3.10, too old for vflax; uv brings another beside it.
find_uv() {
  local found
  for found in "$(command -v uv || true)" "$base/.local/bin/uv"; do
    if ! dry && [ -x "$found" ]; then
      echo "$found"
      return
    fi
  done
  remark "where uv is on PATH, that one, and where it is in $base/.local/bin, without this:"
  # Debian and newer Ubuntu refuse to install beside their own packages unless told to.
  plan env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv >&2
  echo "$base/.local/bin/uv"
}

# What is mounted where is kept, so that a worker that was rebooted mounts it again before a run starts.
save_storage() {
  plan rm -f "$home/storage"
  if [ -n "${opt[bucket]-}" ]; then
    plan_line "$(quoted echo bucket "${opt[bucket]#gs://}" "${opt[mount]}") >$(quoted "$home/storage")"
  elif [ -n "${opt[nfs]-}" ]; then
    plan_line "$(quoted echo nfs "${opt[nfs]}" "${opt[mount]}") >$(quoted "$home/storage")"
  fi
}

# A bucket's mount has its name as the source, a share's its HOST:/SHARE.
mount_storage() {
  local kind='' what='' where='' there=''
  if dry; then
    plan_storage
    [ -n "$kind" ] || return 0
    remark "unless $what is mounted at $where already:"
  else
    [ -f "$home/storage" ] || return 0
    read -r kind what where <"$home/storage"
    there=$(findmnt -n -o SOURCE --mountpoint "$where" | tail -n 1 || true)
    if [ -n "$there" ] && [ "${there%/}" = "${what%/}" ]; then return 0; fi
  fi
  mount_now
}

# For a plan: sets kind, what and where, if this command is told of a storage.
plan_storage() {
  where=${opt[mount]-}
  if [ -n "${opt[bucket]-}" ]; then
    kind=bucket what=${opt[bucket]#gs://}
  elif [ -n "${opt[nfs]-}" ]; then
    kind=nfs what=${opt[nfs]}
  elif [ -z "${opt[commit]-}" ]; then
    remark "if the machine was restarted, the storage of the installation is mounted again, by the commands of install"
  fi
}

mount_now() {
  local indent="$indent  "
  unmount_other
  plan sudo mkdir -p "$where"
  case $kind in
    bucket)
      install_gcsfuse
      own "$where"
      # No caches of names: the hosts must see at once what another one wrote. Where the bucket has no folders of its
      # own (no hierarchical namespace), the limit is what lets a checkpoint's folder be renamed at all.
      plan gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --rename-dir-limit=200000 "$what" "$where"
      ;;
    nfs)
      install_nfs
      plan sudo mount -t nfs -o hard "$what" "$where"
      own "$where"
      ;;
  esac
  plan mountpoint -q "$where" || die "$what did not mount at $where"
  dry || echo "mounted $what at $where"
}

unmount_other() {
  remark "where something else is mounted there, which is an error while a run is going:"
  local indent="$indent  "
  if dry || [ -n "$there" ]; then
    dry || free
    plan sudo umount "$where" ||
      die "$there is mounted at $where, not $what, and in use: end what uses it there, or install with another --mount"
    dry || echo "unmounted $there from $where"
  fi
}

own() { plan_line "sudo chown \"\$(id -u):\$(id -g)\" $(quoted "$1")"; }

install_nfs() {
  remark "where there is no mount.nfs:"
  local indent="$indent  "
  if dry || ! command -v mount.nfs >/dev/null; then plan sudo apt-get install -y -q nfs-common; fi
}

# cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
  remark "where there is no gcsfuse:"
  local indent="$indent  "
  if ! dry && command -v gcsfuse >/dev/null; then return; fi
  plan_line "curl -sf $from/doc/apt-key.gpg | sudo tee $key >/dev/null"
  plan_line "echo \"deb [signed-by=$key] $from gcsfuse-\$(lsb_release -c -s) main\" |\
 sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null"
  plan sudo apt-get update -q
  plan sudo apt-get install -y -q gcsfuse
}

# Shards are read from the worker's own disk: faster than a mounted bucket, and each worker has all of them.
copy_data() {
  [ -n "${opt[data]-}" ] || return 0
  plan sudo mkdir -p "${opt[data-dir]}"
  own "${opt[data-dir]}"
  plan gcloud storage rsync --recursive "${opt[data]}" "${opt[data-dir]}"
  dry || echo "copied ${opt[data]} to ${opt[data-dir]}"
}

# The limit is for the case that a worker is missing: the others would wait for it for ever.
chips() { plan timeout "${opt[timeout]-300}" "$python" "$src/launch/check_devices.py"; }

mark() {
  mount_storage
  if dry || [ ! -d "$1" ]; then plan mkdir -p "$1"; fi
  plan touch "$1/.seen-$2"
}

seen() {
  local try
  mount_storage
  remark "asked up to five times:"
  for try in 1 2 3 4 5; do
    if plan test -e "$1/.seen-$2"; then return; fi
    [ "$try" = 5 ] || sleep "${opt[pause]-2}"
  done
  die "$1 is not the folder that worker 0 has under this name"
}

unmark() { plan rm -f "$1/.seen-$2"; }

boot=/proc/sys/kernel/random/boot_id

# For what would pull the ground from under a run.
free() {
  remark "an error while a run is going, which $run/pid names"
  dry || ! running || die "a run is going (process $(cat "$run/pid")): tpu.sh stop ends it"
}

running() {
  [ -f "$run/pid" ] && [ ! -f "$run/status" ] && [ "$(cat "$run/boot")" = "$(cat $boot)" ] &&
    kill -0 "$(cat "$run/pid")" 2>/dev/null
}

start() {
  local command try word
  free
  dry || [ -x "$python" ] || die "nothing is installed: tpu.sh install first"
  mount_storage
  plan mkdir -p "$run"
  plan rm -f "$run/status" "$run/pid"
  plan_line "cat $boot >$(quoted "$run/boot")"
  plan_line "$(quoted echo "${opt[workdir]}") >$(quoted "$run/workdir")"
  # Exported, they are in no command line that the log shows.
  for word in "${environment[@]}"; do plan export "${word?}"; done
  plan_line "echo \"\${VFLAX_CACHE:-\$HOME/.cache/vflax}\" >$(quoted "$run/cache")"
  command=("$python" -m vflax.supervise ${opt[max-restarts]:+--max_restarts="${opt[max-restarts]}"} --
    "$python" -m vflax.launch --distributed "${rest[@]}")
  if dry; then
    remark "in $src and a session of its own, process, output and status kept in $run:"
    plan "${command[@]}"
    return
  fi
  # A session of its own: it outlives the ssh connection that starts it.
  # shellcheck disable=SC2016  # its words are arguments
  setsid nohup bash -c 'cd "$1" || exit; shift
    echo "== $(date -u +%FT%TZ) $*"
    "$@" &
    echo $! >"$0/pid"
    wait $!
    echo $? >"$0/status.new" && mv "$0/status.new" "$0/status"' "$run" "$src" "${command[@]}" \
    </dev/null >>"$run/log" 2>&1 &
  for ((try = 0; try < 50; try++)); do
    if [ -f "$run/pid" ]; then
      echo "started, process $(cat "$run/pid")"
      return
    fi
    sleep 0.1
  done
  die "did not start: $(tail -n 1 "$run/log")"
}

status() {
  local state=idle workdir='' file
  if dry; then
    remark "nothing that changes anything: what $home/installed, $run and status.json in WORKDIR say, is read"
    return
  fi
  if [ ! -f "$home/installed" ]; then
    echo absent
    return
  fi
  if running; then
    state="running, process $(cat "$run/pid")"
  elif [ -f "$run/status" ]; then
    state="ended $(cat "$run/status")"
  elif [ -f "$run/boot" ]; then
    state="gone: the machine was restarted, or the run killed"
  fi
  if [ -f "$run/workdir" ]; then workdir=$(cat "$run/workdir"); fi
  echo "$state${workdir:+; workdir $workdir}; installed $(cat "$home/installed")"
  if [ "$number" = 0 ] && [ -n "$workdir" ]; then
    file=$workdir/status.json
    # The mirror of a bucket, see vflax/mirror.py.
    case $workdir in gs://*) file=$(cat "$run/cache")/runs/0/${workdir#gs://}/status.json ;; esac
    if [ -f "$file" ]; then echo "$workdir: $(tr -s '\n ' ' ' <"$file")"; fi
  fi
}

log() {
  dry || [ -f "$run/log" ] || die "no run was started here"
  local follow=()
  [ -z "${opt[follow]-}" ] || follow=(--follow=name --retry)
  plan tail --lines="${opt[lines]-50}" "${follow[@]}" "$run/log"
}

# The supervisor hands SIGTERM on; the run saves a checkpoint and ends.
stop() {
  local waited try pid
  pid="\"\$(cat $(quoted "$run/pid"))\""
  if ! dry && ! running; then
    echo "nothing is running"
    return
  fi
  remark "if a run is going; then it has ${opt[grace]-300} s to save:"
  plan_line "kill -TERM $pid"
  for ((waited = 0; waited < ${opt[grace]-300} * 5; waited++)); do
    ! dry || break
    if ! running; then
      for try in {1..20}; do
        if [ -f "$run/status" ] || [ "$try" = 20 ]; then break; fi
        sleep 0.1
      done
      echo "stopped, status $(cat "$run/status")"
      return
    fi
    sleep 0.2
  done
  if dry && [ -z "${opt[kill]-}" ]; then return; fi
  [ -n "${opt[kill]-}" ] || die "still saving after ${opt[grace]-300} s: wait, or tpu.sh stop --kill loses what is unsaved"
  remark "if it is still going then:"
  # All of the session: the supervisor starts the run in a process group of its own.
  plan_line "kill -KILL \$(ps -o pid= -s \"\$(ps -o sid= -p $pid | tr -d ' ')\") 2>/dev/null" || true
  plan_line "echo 137 >$(quoted "$run/status")"
  dry || echo "killed"
}

have() {
  local folder=$1 name
  shift
  mount_storage
  plan test -d "$folder" || die "$folder is not there"
  for name in "$@"; do
    if plan test -e "$folder/$name"; then dry || echo "have $name"; fi
  done
}

main() {
  local what=${1-}
  shift || true
  parse_options "follow kill dry-run" \
    "commit python bucket nfs mount data data-dir timeout pause max-restarts env workdir lines grace" "$@"
  # Another machine's home.
  # shellcheck disable=SC2016
  if dry; then places '$HOME'; fi
  case $what in
    install) install ;;
    chips) chips ;;
    mark) mark "${positional[@]}" ;;
    seen) seen "${positional[@]}" ;;
    unmark) unmark "${positional[@]}" ;;
    free) free ;;
    start) start ;;
    status) status ;;
    log) log ;;
    stop) stop ;;
    have) have "${positional[@]}" ;;
    *) die "worker.sh knows no $what" ;;
  esac
}

# No `set -e` around the pipeline: its status is main's. Inside main it holds.
set +e
words=" $* "
if [[ ${words%% -- *} == *" --dry-run"* ]]; then
  number=''
  # So that a shell puts the home there.
  edit="s/'\(\$HOME[^']*\)'/\"\1\"/g"
else
  number=$(worker_number)
  edit="s/^/[worker $number] /"
fi
(
  set -e
  # A plan goes through sed as well. Without one nothing is written to 3, and what stays, as gcsfuse does, would keep
  # the connection open by it.
  if [ -z "$number" ]; then exec 3>&1; else exec 3>&-; fi
  main "$@"
) 2>&1 | sed ${number:+-u} "$edit" # a plan may be made by a sed that knows no -u
exit "${PIPESTATUS[0]}"
