#!/usr/bin/env bash
# TPU VMs and pods: book a slice, install this checkout on its workers, train, follow, fetch, delete.
#
#   launch/tpu.sh create NAME --accelerator=v5e-16 [--spot | --reserved] [--valid-until=6h] [--runtime=IMAGE]
#                 [--network=N] [--subnetwork=N] [--service-account=A] [--no-wait] [--poll=15]
#   launch/tpu.sh install NAME [--bucket=gs://B | --nfs=HOST:/SHARE] [--mount=/mnt/vflax] [--python=3.12]
#                 [--data=gs://B/FOLDER] [--data-dir=/mnt/vflax-data]
#   launch/tpu.sh run NAME [--max-restarts=N] [--restart] [--env=NAME=VALUE ...]
#                 -- --config=configs/stage1.py:7b --workdir=/mnt/vflax/runs/a ...      --env: a variable that the run finds
#   launch/tpu.sh train NAME ...   all three in one, with the options of all three, until the run is done, looked at
#                 every --poll=60 s: goes on where things stand, books a slice that was taken back again
#                 (--max-recreations=20); --delete deletes it when the run is done
#   launch/tpu.sh status NAME
#   launch/tpu.sh logs NAME [--worker=0|1|...|all] [--lines=50] [--follow]
#   launch/tpu.sh fetch NAME --workdir=/mnt/vflax/runs/a --out=DIR [--parts=export,summary.html,...]   from worker 0
#   launch/tpu.sh fetch --workdir=gs://B/runs/a --out=DIR [--parts=...]        from a bucket, with or without a slice
#   launch/tpu.sh stop NAME [--grace=300] [--kill]
#   launch/tpu.sh delete NAME [--yes]
#
# Each takes --project and --zone (default: gcloud's own configuration) and --dry-run, which prints the exact commands
# and runs none; what stands further in, the workers would run. Names of slices are those of `python -m vflax.plan`:
# v5e-16, v6e-8, v4-32, v5p-16, v4:4x4x2. NAME is both the queued resource and the TPU. The whole way, with costs: docs/pods.md.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
worker=vflax/src/launch/worker.sh # in the home of each worker
parts=export,config.json,status.json,metrics.jsonl,summary.json,summary.html
# What a worker says of itself, see worker.sh status: state, WORKDIR of its last run, flags it was installed with.
status_line='^\[worker [0-9?]*\] (absent|idle|gone|running|ended [0-9]+)[^;]*(; workdir ([^;]*))?(; installed (.*))?$'
misses_allowed=5 # gcloud may fail so often in a row, while waiting, before that is an error
scratch=         # a folder of this run of the script
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT

# --- what every command begins with ---

begin() {
  need gcloud "install the Google Cloud CLI, cloud.google.com/sdk/docs/install, or use Cloud Shell"
  where=()
  name=${positional[0]-}
  [ -n "$name" ] || die "give the NAME of the slice, see --help"
  [ "${#positional[@]}" = 1 ] || die "one NAME, not ${positional[*]} (options of the run follow a lone --)"
  [[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    die "$name: a name has small letters, digits and dashes, and begins with a letter"
  if ! dry; then scratch=$(mktemp -d); fi
  place
  want_number poll
  poll=${opt[poll]-15}
}

# The zone and the project are asked for here once, so that a missing one is told at once and in plain words.
place() {
  local zone=${opt[zone]-} project=${opt[project]-} own='' own_project
  if dry; then
    [ -n "$zone" ] || remark "no --zone: gcloud takes the one of its configuration (gcloud config get compute/zone)"
  else
    if [ -z "$zone" ] || [ -z "$project" ]; then
      own=$(gcloud config list --format='value[separator="|"](compute.zone,core.project)' 2>/dev/null || true)
    fi
    IFS='|' read -r own own_project <<<"$own"
    zone=${zone:-$own} project=${project:-$own_project}
    [ -n "$zone" ] || die "no zone: give --zone=us-west4-a, or gcloud config set compute/zone us-west4-a"
    [ -n "$project" ] || die "no project: give --project=ID, or gcloud config set project ID"
  fi
  [ -z "$zone" ] || where+=(--zone="$zone")
  [ -z "$project" ] || where+=(--project="$project")
}

tpus=(gcloud compute tpus)

# on WORKER COMMAND ...: worker.sh there (all: on every worker at once).
on() {
  local which=$1
  shift
  plan "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --quiet --worker="$which" \
    --command="$(quoted bash "$worker" "$@")" || return
  there "$which" "$@"
}

# there WORKER COMMAND ...: the lines of a plan that say what worker.sh runs there.
there() {
  local indent="    "
  if dry; then
    if [ "$1" = all ]; then remark "each worker runs:"; else remark "worker $1 runs:"; fi
    bash "$root/launch/worker.sh" "$2" --dry-run "${@:3}" | sed "s/^/$indent/" >&3
  fi
}

# --- the state of a slice ---

# describe WHAT FORMAT: asks gcloud; sets answer, or, returning 1, answer=ABSENT where there is no such thing and
# answer=UNKNOWN, with a reason, where gcloud failed. In a dry run it prints the command.
describe() {
  answer=UNKNOWN
  if dry; then
    plan "${tpus[@]}" "$1" describe "$name" "${where[@]}" "$2"
    return 1
  fi
  if answer=$(plan "${tpus[@]}" "$1" describe "$name" "${where[@]}" "$2" 2>"$scratch/error"); then return 0; fi
  if grep -q "NOT_FOUND\|was not found" "$scratch/error"; then
    answer=ABSENT
  else
    answer=UNKNOWN reason=$(cat "$scratch/error")
  fi
  return 1
}

# The request: sets state, initiator, reason, and what was asked for: kind, or shape where it was booked by that.
queued() {
  initiator='' reason='' kind='' shape=''
  if describe queued-resources "$queued_format"; then
    IFS='|' read -r state initiator kind shape reason <<<"$answer"
  else
    state=$answer
  fi
}
asked_node='tpu.nodeSpec[0].node'
queued_format="--format=value[separator=\"|\"](state.state,state.stateInitiator,$asked_node.acceleratorType,\
$asked_node.acceleratorConfig.topology,state.failedData.error.message)"

# The TPU itself: sets node, accelerator_type and workers.
node() {
  accelerator_type='' workers=0
  if describe tpu-vm "$node_format"; then
    IFS='|' read -r node accelerator_type workers <<<"$answer"
  else
    node=$answer
  fi
}
node_format='--format=value[separator="|"](state,acceleratorType,networkEndpoints.len())'

meaning() {
  case $state in
    ABSENT) echo "there is no such request" ;;
    CREATING | ACCEPTED) echo "the request has arrived" ;;
    WAITING_FOR_RESOURCES) echo "in the queue until there is capacity; costs nothing yet" ;;
    PROVISIONING) echo "the machines are being made" ;;
    ACTIVE) echo "the machines are there, and cost money until tpu.sh delete" ;;
    FAILED) echo "not booked: ${reason:-no reason given}" ;;
    SUSPENDING | SUSPENDED)
      if [ "$initiator" = USER ]; then
        echo "the machines were deleted by you or your project; the request is only a shell now"
      else
        echo "Google took the machines back; they are gone with their disks"
      fi
      ;;
    DELETING) echo "being deleted" ;;
    *) echo "${reason:-unknown to this script}" ;;
  esac
}

# What to do about a request that will not become a slice.
remedy() {
  if [ "$state" = FAILED ]; then
    case ${reason,,} in
      *quota*) echo "ask for quota (IAM & Admin > Quotas, service Cloud TPU API), or book another kind or zone" ;;
      *permission*) echo "you need the role TPU Admin, and the Cloud TPU API: gcloud services enable tpu.googleapis.com" ;;
      *) echo "which kinds a zone has: gcloud compute tpus accelerator-types list --zone=ZONE" ;;
    esac
    echo "then tpu.sh delete $name --yes and create it again"
  else
    echo "tpu.sh train books it again by itself; by hand: tpu.sh delete $name --yes, then create"
  fi
}

refuse() {
  local line text
  text="$name is $state: $(meaning)"
  while read -r line; do text+=$'\n'"       $line"; done < <(remedy)
  die "$text"
}

# Waits until the machines are there. Returns 1 when they will not come.
wait_active() {
  local before='' misses=0 now
  node=
  while :; do
    queued
    now=$state
    if [ "$state" = ACTIVE ]; then
      node
      [ "$node" = READY ] || now="ACTIVE, TPU $node"
    fi
    if [ "$now" != "$before" ]; then say "$name: $now ($(meaning))"; fi
    before=$now
    case $state/$node in
      ACTIVE/READY) return 0 ;;
      ACTIVE/PREEMPTED | ACTIVE/TERMINATED) state=SUSPENDED && return 1 ;;
    esac
    case $state in
      FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
      UNKNOWN | ABSENT)
        misses=$((misses + 1))
        [ $misses -lt $misses_allowed ] || die "${reason:-$name is not there any more}"
        ;;
      *) misses=0 ;;
    esac
    sleep "$poll"
  done
}

# For a command that needs the machines now.
want_active() {
  node=UNKNOWN
  queued
  if ! dry; then
    [ "$state" != UNKNOWN ] || die "$reason"
    [ "$state" != ABSENT ] || die "there is no $name in this zone and project; tpu.sh create books it"
    [ "$state" = ACTIVE ] || refuse
  fi
  node
  if ! dry; then
    case $node in
      READY) ;;
      PREEMPTED | TERMINATED) state=SUSPENDED && refuse ;;
      *) die "the TPU of $name is $node, not READY: ${reason:-wait a minute}" ;;
    esac
  fi
}

# --- create ---

create_options="accelerator valid-until runtime network subnetwork service-account poll"
create_flags="spot reserved"

check_create() {
  local line key value
  [ -n "${opt[accelerator]-}" ] || die "give --accelerator, such as v5e-16 (python -m vflax.plan says what fits)"
  [ -z "${opt[spot]-}" ] || [ -z "${opt[reserved]-}" ] || die "--spot or --reserved, not both"
  [[ ${opt[valid-until]-1h} =~ ^[0-9]+[smhd]$ ]] || die "--valid-until=${opt[valid-until]}: expected a time such as 6h"
  line=$(booking "${opt[accelerator]}") || exit 1
  while IFS='=' read -r key value; do booked[$key]=$value; done <<<"$line"
  [ "${booked[slices]}" = 1 ] || die "${opt[accelerator]}: several slices as one job are booked with launch/gke.sh"
}
declare -A booked=()

# What has this NAME already must be what is asked for.
check_booked() {
  local there=$kind wanted=${booked[accelerator_type]}
  if [ -z "$there" ] || [ -z "$wanted" ]; then there=$shape wanted=${booked[topology]}; fi
  [ -z "$there" ] || [ "$there" = "$wanted" ] ||
    die "$name is there, as ${kind:-$shape} and not as --accelerator=${opt[accelerator]}: give the one that is there, or another
       NAME, or tpu.sh delete $name first"
}

book() {
  local command=("${tpus[@]}" queued-resources create "$name" "${where[@]}" --node-id="$name")
  if [ -n "${booked[accelerator_type]}" ]; then
    command+=(--accelerator-type="${booked[accelerator_type]}")
  else
    command+=(--type="${booked[generation]}" --topology="${booked[topology]}")
  fi
  command+=(--runtime-version="${opt[runtime]-${booked[runtime]}}")
  [ -z "${opt[spot]-}" ] || command+=(--spot)
  [ -z "${opt[reserved]-}" ] || command+=(--reserved)
  [ -z "${opt[valid-until]-}" ] || command+=(--valid-until-duration="${opt[valid-until]}")
  [ -z "${opt[network]-}" ] || command+=(--network="${opt[network]}")
  [ -z "${opt[subnetwork]-}" ] || command+=(--subnetwork="${opt[subnetwork]}")
  [ -z "${opt[service-account]-}" ] || command+=(--service-account="${opt[service-account]}")
  say "$name: booking ${opt[accelerator]}, ${booked[chips]} chips${opt[spot]:+, Spot}${opt[reserved]:+, reserved}"
  plan "${command[@]}" --quiet || die "gcloud did not take the request for $name"
}

create() {
  parse_options "$create_flags no-wait dry-run" "$create_options project zone" "$@"
  check_create
  begin
  queued
  case $state in
    UNKNOWN) dry || die "$reason" ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) refuse ;;
    ABSENT) ;;
    *)
      check_booked
      say "$name is there already"
      ;;
  esac
  if dry || [ "$state" = ABSENT ]; then book; fi
  [ -z "${opt[no-wait]-}" ] || return 0
  if dry; then
    remark "then every $poll s, until it is ACTIVE and its TPU is READY:"
    queued
    node
  else
    wait_active || refuse
  fi
}

# --- install ---

install_options="bucket nfs mount python data data-dir"

check_install() {
  [ -z "${opt[bucket]-}" ] || [ -z "${opt[nfs]-}" ] || die "--bucket or --nfs: both would be mounted at --mount"
  [[ ${opt[bucket]-gs://b} =~ ^gs://[a-z0-9][a-z0-9._-]+/?$ || -z ${opt[bucket]-} ]] ||
    die "--bucket=${opt[bucket]}: expected gs://NAME, small letters, the bucket as a whole"
  [[ -z ${opt[nfs]-} || ${opt[nfs]} =~ ^[^:/]+:/.+$ ]] || die "--nfs=${opt[nfs]}: expected HOST:/SHARE"
  [[ -z ${opt[data]-} || ${opt[data]} == gs://* ]] || die "--data=${opt[data]}: expected gs://BUCKET/FOLDER"
  [ -z "${opt[bucket]-}" ] || opt[bucket]=${opt[bucket]%/}
  opt[mount]=${opt[mount]-/mnt/vflax} opt[data-dir]=${opt[data-dir]-/mnt/vflax-data}
  [[ ${opt[mount]} == /* && ${opt[data-dir]} == /* ]] || die "--mount and --data-dir are absolute paths"
  [[ ${opt[python]-3.12} =~ ^3\.(1[1-9]|[2-9][0-9])(\.[0-9]+)?$ ]] ||
    die "--python=${opt[python]}: vflax needs 3.11 or newer"
  need git "it packs this checkout"
  git -C "$root" rev-parse --verify -q HEAD >/dev/null || die "$root is not a git checkout: clone the repository"
  commit=$(git -C "$root" rev-parse --short=12 HEAD)
  asked=(--commit="$commit")
  want_installed python
  if [ -n "${opt[bucket]-}${opt[nfs]-}" ]; then want_installed bucket nfs mount; fi
  if [ -n "${opt[data]-}" ]; then want_installed data data-dir; fi
}

# Adds options to what worker.sh install is told.
want_installed() {
  local option
  for option in "$@"; do
    [ -z "${opt[$option]-}" ] || asked+=(--"$option=${opt[$option]}")
  done
}

# Packs the last commit, brings it to all workers, installs it there, counts chips.
do_install() {
  local archive changed free="[ ! -f $worker ] || bash $worker free"
  changed=$(git -C "$root" status --porcelain | wc -l)
  [ "$changed" = 0 ] || printf 'note: %s changed files are not committed and stay behind\n' "$changed" >&2
  archive=${scratch:-/tmp}/vflax.tar.gz
  plan git -C "$root" archive --format=tar.gz --output="$archive" "$commit" || die "git could not pack $root"
  say "$name: installing $commit on $workers workers"
  plan "${tpus[@]}" tpu-vm scp "$archive" "$name:vflax.tar.gz" "${where[@]}" --quiet --worker=all ||
    die "the checkout did not reach every worker of $name"
  plan "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --quiet --worker=all --command="{ $free; } && \
rm -rf vflax/src && mkdir -p vflax/src && tar xzf vflax.tar.gz -C vflax/src && $(quoted bash "$worker" install "${asked[@]}")" ||
    die "the installation failed, see above which worker says why"
  there all free
  there all install "${asked[@]}"
  if dry; then
    on all chips
  else
    on all chips 2>&1 | tee "$scratch/chips" || true
    check_chips "$scratch/chips"
  fi
}

# Every worker must have its share of the chips that were booked, and see all of them.
check_chips() {
  local line each problems='' unseen='' number have all want
  line=$(booking "$accelerator_type") || exit 1
  want=$(sed -n 's/^chips=//p' <<<"$line")
  each=$((want / workers))
  for ((number = 0; number < workers; number++)); do
    line=$(grep -m1 "^\[worker $number\] chips " "$1" || true)
    if [[ $line =~ chips\ ([0-9]+)\ of\ ([0-9]+) ]]; then
      have=${BASH_REMATCH[1]} all=${BASH_REMATCH[2]}
      if [ "$have" != "$each" ]; then
        problems+=$'\n'"       worker $number has $have chips, not $each: ${line#*, }"
      elif [ "$all" != "$want" ]; then
        unseen+=$'\n'"       worker $number sees $all chips in all, not $want"
      fi
    else
      problems+=$'\n'"       worker $number did not answer"
    fi
  done
  problems=${problems:-$unseen} # when one has too few, all see too few
  [ -z "$problems" ] || die "$name was booked as $accelerator_type, $want chips on $workers workers, but$problems
       a machine with a broken chip is not mended by hand: delete $name and create it again"
  say "$name: $want chips on $workers workers, as booked"
}

install() {
  parse_options "dry-run" "$install_options project zone" "$@"
  check_install
  begin
  want_active
  do_install
}

# --- run ---

# The flags of vflax.launch that follow --; sets workdir.
check_run() {
  local index word
  workdir=''
  want_number max-restarts
  for word in "${environment[@]}"; do
    [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env=${word%%=*}: expected NAME=VALUE"
  done
  [ "${#rest[@]}" -gt 0 ] || die "give the flags of vflax.launch after a lone --, see --help"
  for index in "${!rest[@]}"; do
    word=${rest[index]}
    case $word in
      --workdir=*) workdir=${word#--workdir=} ;;
      --workdir) workdir=${rest[index + 1]-} ;;
      --distributed | --coordinator*) die "$word: tpu.sh joins the workers itself" ;;
    esac
  done
  [[ " ${rest[*]}" == *" --config"[=\ ]* ]] || die "--config is missing after --, such as --config=configs/stage1.py:7b"
  [ -n "$workdir" ] || die "--workdir is missing after --, such as --workdir=/mnt/vflax/runs/stage1"
  case $workdir in
    gs://*/* | /*) ;;
    *://*) die "--workdir=$workdir: give gs://BUCKET/FOLDER, or a folder that all workers see" ;;
    *) die "--workdir=$workdir: give an absolute path, such as /mnt/vflax/runs/stage1" ;;
  esac
  workdir=${workdir%/}
}

# A WORKDIR on the workers' own disks would be another folder on each of them. A bucket is the same for all.
check_shared() {
  [[ $workdir != gs://* ]] || return 0
  local token=$$-$RANDOM
  if dry; then token=TOKEN; fi
  if ! dry && [ "$workers" -le 1 ]; then return; fi
  on 0 mark "$workdir" "$token" || die "worker 0 cannot make --workdir=$workdir"
  if ! on all seen "$workdir" "$token"; then
    on 0 unmark "$workdir" "$token"
    die "--workdir=$workdir is not one folder for all workers of $name: tpu.sh install --bucket=gs://B or
       --nfs=HOST:/SHARE mounts one at /mnt/vflax on each of them, or give --workdir=gs://B/FOLDER"
  fi
  on 0 unmark "$workdir" "$token"
}

do_run() {
  local word variables=()
  for word in "${environment[@]}"; do
    if dry; then word=${word%%=*}=VALUE; fi # it may be a token
    variables+=(--env="$word")
  done
  check_shared
  on all start ${opt[max-restarts]:+--max-restarts="${opt[max-restarts]}"} "${variables[@]}" \
    --workdir="$workdir" -- "${rest[@]}" ||
    die "not every worker of $name started; tpu.sh stop $name ends those that did"
}

run() {
  parse_options "restart dry-run" "max-restarts env project zone" "$@"
  check_run
  begin
  want_active
  if [ -n "${opt[restart]-}" ]; then on all stop || die "the run before did not end"; fi
  do_run
  say "$name: started; it goes on when you log out. Follow it: launch/tpu.sh logs $name --follow"
}

# --- status, logs, stop ---

status() {
  parse_options "dry-run" "project zone" "$@"
  begin
  node=
  queued
  dry || [ "$state" != UNKNOWN ] || die "$reason"
  if ! dry; then echo "$name: $state ($(meaning))"; fi
  if ! dry && [ "$state" != ACTIVE ]; then return; fi
  node
  if ! dry; then echo "$name: TPU $node, $accelerator_type, $workers workers"; fi
  if dry || [ "$node" = READY ]; then on_installed; fi
}

# worker.sh status everywhere; a worker on which nothing is installed says so too.
on_installed() {
  plan "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --quiet --worker=all \
    --command="if [ -f $worker ]; then bash $worker status; else echo '[worker ?] absent'; fi" || return
  there all status
}

logs() {
  local which
  parse_options "follow dry-run" "worker lines project zone" "$@"
  want_number lines
  which=${opt[worker]-0}
  [[ $which =~ ^([0-9]+|all)$ ]] || die "--worker=$which: a number or all"
  begin
  want_active
  dry || [ "$which" = all ] || [ "$which" -lt "$workers" ] || die "--worker=$which: $name has workers 0 to $((workers - 1))"
  on "$which" log --lines="${opt[lines]-50}" ${opt[follow]:+--follow} || die "no log could be read"
}

stop() {
  parse_options "kill dry-run" "grace project zone" "$@"
  want_number grace
  begin
  want_active
  on all stop --grace="${opt[grace]-300}" ${opt[kill]:+--kill} || die "not every worker of $name stopped, see above"
}

# --- fetch ---

fetch() {
  local wanted
  parse_options "dry-run" "workdir out parts project zone" "$@"
  [ -n "${opt[workdir]-}" ] || die "give --workdir, a folder of the workers or gs://BUCKET/FOLDER"
  [ -n "${opt[out]-}" ] || die "give --out, the folder here that gets the results"
  IFS=',' read -ra wanted <<<"${opt[parts]-$parts}"
  if [[ ${opt[workdir]} == gs://* ]]; then
    need gcloud "install the Google Cloud CLI, cloud.google.com/sdk/docs/install"
    fetch_bucket "${wanted[@]}"
  else
    begin
    want_active
    fetch_worker "${wanted[@]}"
  fi
}

fetch_bucket() {
  local part sources=()
  local from=${opt[workdir]%/}
  for part in "$@"; do
    if dry || gcloud storage ls "$from/$part" >/dev/null 2>&1; then
      sources+=("$from/$part")
    else
      absent "$part"
    fi
  done
  [ "${#sources[@]}" -gt 0 ] || die "$from has none of $*"
  plan mkdir -p "${opt[out]}"
  plan gcloud storage cp --recursive "${sources[@]}" "${opt[out]}/" ${opt[project]:+--project="${opt[project]}"} ||
    die "the copy failed"
  say "in ${opt[out]}: ${sources[*]##*/}"
}

fetch_worker() {
  local part answer sources=()
  answer=$(on 0 have "${opt[workdir]}" "$@" 2>&1) || die "${answer:-worker 0 did not answer}"
  for part in "$@"; do
    if dry || grep -q "\] have $part\$" <<<"$answer"; then
      sources+=("$name:${opt[workdir]%/}/$part")
    else
      absent "$part"
    fi
  done
  [ "${#sources[@]}" -gt 0 ] || die "${opt[workdir]} on worker 0 has none of $*"
  plan mkdir -p "${opt[out]}"
  plan "${tpus[@]}" tpu-vm scp "${sources[@]}" "${opt[out]}" "${where[@]}" --quiet --worker=0 --recurse ||
    die "the copy failed"
  say "in ${opt[out]}: ${sources[*]##*/}"
}

# A part that was asked for by name must be there; of the usual ones a run that is going has only some.
absent() {
  [ -z "${opt[parts]-}" ] || die "${opt[workdir]} has no $1"
  echo "note: ${opt[workdir]} has no $1 yet" >&2
}

# --- delete ---

do_delete() {
  plan "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet ||
    die "gcloud did not delete $name: look at it in the console, it may go on costing money"
  if dry; then return; fi
  queued
  [ "$state" = ABSENT ] || die "$name is still $state: try again in a minute, it may go on costing money"
  say "$name: deleted, costs nothing any more"
}

delete() {
  local answer
  parse_options "yes dry-run" "project zone" "$@"
  begin
  queued
  if ! dry; then
    [ "$state" != UNKNOWN ] || die "$reason"
    [ "$state" != ABSENT ] || die "there is no $name in this zone and project"
    echo "$name is $state ($(meaning)); its disks go with it"
    if [ -z "${opt[yes]-}" ]; then
      read -r -p "delete it? [y/N] " answer || true
      [[ ${answer-} == [yY]* ]] || die "not deleted"
    fi
  fi
  do_delete
}

# --- train ---

# What the workers do about this WORKDIR. Sets now (absent, idle, gone, running, mixed, done, saved, failed with status N,
# unreachable), other, the WORKDIR of another run that is going, and unlike, what is asked for and not installed.
run_state() {
  local out line state of states=''
  other='' unlike=''
  if ! out=$(on_installed 2>/dev/null); then
    now=unreachable
    return
  fi
  while read -r line; do
    [[ $line =~ $status_line ]] || continue
    state=${BASH_REMATCH[1]} of=${BASH_REMATCH[3]}
    if [ -z "$unlike" ] && [ "$state" != absent ]; then find_unlike "${BASH_REMATCH[5]}"; fi
    if [ -n "$of" ] && [ "$of" != "$workdir" ]; then
      if [ "$state" = running ]; then other=$of; fi
      state=idle # how another run ended says nothing about this one
    fi
    states+=$state$'\n'
  done <<<"$out"
  states=$(sort -u <<<"${states%$'\n'}")
  case $states in
    running) now=running ;;
    *absent*) now=absent ;;
    *running*) now=mixed ;;
    *gone*) now=gone ;;
    *idle*) now=idle ;;
    "ended 0") now="done" ;;
    "ended 75") now=saved ;;
    *) now="failed with status ${states##*ended }" ;;
  esac
}

# find_unlike INSTALLED: what is asked for and not among those flags.
find_unlike() {
  local flag
  for flag in "${asked[@]}"; do
    flag=$(quoted "$flag")
    [[ " $1 " == *" $flag "* ]] || unlike+="${unlike:+ }$flag"
  done
}

# What is asked for and not installed, installed again unless a run is going. The storage decides which WORKDIR it is;
# a newer commit changes neither a run that is going nor one that is done.
follow_unlike() {
  local storage=''
  if [[ $unlike =~ --(bucket|nfs|mount)= ]]; then storage=yes; fi
  case $now in
    running)
      [ -z "$storage" ] || die "$name was installed without $unlike, and a run is going on it: tpu.sh stop $name ends that"
      [ -n "$noted" ] || say "$name: note: the run that is going was installed without $unlike, and goes on as it is"
      noted=yes
      ;;
    absent | mixed | unreachable) ;;
    *)
      if [ "$now" = "done" ] && [ -z "$storage" ]; then return; fi
      say "$name: installed without $unlike: once more"
      now=absent
      ;;
  esac
}

# Books again what was taken back. A request that never became a slice is an error, not a preemption; and what a person
# has deleted meanwhile stays deleted.
again() {
  local tries=0
  if [ "$state" = FAILED ] && [ -z "$was_active" ]; then refuse; fi
  if [ "$initiator" = USER ] && [ -n "$was_active" ]; then refuse; fi
  recreated=$((recreated + 1))
  [ $recreated -le "${opt[max-recreations]-20}" ] ||
    die "$name was taken back more than ${opt[max-recreations]-20} times (--max-recreations)"
  say "$name: $state ($(meaning)); booking it again, time $recreated"
  while [ "$state" != ABSENT ]; do
    tries=$((tries + 1))
    [ $tries -le 40 ] || die "$name stays $state and cannot be deleted: look at it in the console"
    case $state in
      SUSPENDING | DELETING | UNKNOWN) sleep "$poll" ;;
      *) plan "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet || sleep "$poll" ;;
    esac
    queued
  done
  book
}

train() {
  local started='' before='' noted='' now other unlike misses=0 resumed=0
  recreated=0 was_active=''
  parse_options "$create_flags delete dry-run" \
    "$create_options $install_options max-restarts env max-recreations project zone" "$@"
  want_number max-recreations
  check_create
  check_install
  check_run
  opt[poll]=${opt[poll]-60} # each look is a connection to every worker
  if [[ $workdir != gs://* ]]; then
    [ -n "${opt[bucket]-}${opt[nfs]-}" ] ||
      die "give --workdir=gs://B/FOLDER, --bucket=gs://B or --nfs=HOST:/SHARE: what lies on the slice is lost with it"
    [[ $workdir == "${opt[mount]}"/* ]] ||
      die "--workdir=$workdir must lie under ${opt[mount]}, where --bucket or --nfs is mounted: the rest is lost with the slice"
  fi
  begin
  if dry; then
    plan_train
    return
  fi
  while :; do
    queued
    case $state in
      UNKNOWN) ;;
      ABSENT)
        [ -z "$was_active" ] || die "$name was deleted meanwhile: not booked again"
        book
        ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        check_booked
        again
        ;;
      *) check_booked ;;
    esac
    if ! wait_active; then
      again
      continue
    fi
    was_active=yes
    run_state
    [ -z "$other" ] || die "$name is in use by another run, in $other: wait until it ends, or tpu.sh stop $name ends it"
    [ "$now" = "$before" ] || say "$name: the run is ${now/absent/not there: nothing is installed}"
    before=$now
    [ -z "$unlike" ] || follow_unlike
    [ "$now" = unreachable ] || [ "$now" = mixed ] || misses=0
    case $now in
      absent)
        # In a shell of its own: a slice that is taken back meanwhile is no error.
        (do_install) || taken_back || die "the installation failed"
        ;;
      idle | gone | saved)
        if [ "$now" = saved ]; then resumed=$((resumed + 1)); fi
        [ $resumed -le "${opt[max-recreations]-20}" ] || die "the run only saves and ends, again and again: see tpu.sh logs"
        (do_run) || taken_back || die "the run did not start"
        started=yes
        ;;
      running) sleep "$poll" ;;
      done)
        if [ -z "$started" ]; then say "$name: this run had ended before"; fi
        break
        ;;
      failed*)
        on all log --lines=20 || true
        die "the run $now, see above; mended, it goes on with tpu.sh run (the slice still costs money)"
        ;;
      *)
        misses=$((misses + 1))
        [ $misses -lt 40 ] || die "$name stays $now: see tpu.sh status and logs (the slice still costs money)"
        sleep "$poll"
        ;;
    esac
  done
  say "$name: done, results in $workdir"
  if [ -n "${opt[delete]-}" ]; then
    do_delete
  else
    say "$name still costs money: launch/tpu.sh delete $name"
  fi
}

# Are the machines gone again?
taken_back() {
  queued
  [ "$state" = ACTIVE ] || return 0
  node
  [ "$node" = PREEMPTED ] || [ "$node" = TERMINATED ]
}

plan_train() {
  queued
  book
  remark "every $poll s, until it is ACTIVE and its TPU is READY (deleted and booked again when it is taken back):"
  queued
  node
  do_install
  do_run
  remark "every $poll s, until the run is done:"
  on_installed
  if [ -n "${opt[delete]-}" ]; then do_delete; fi
}

main() {
  local what=${1-}
  shift || true
  case $what in
    create) create "$@" ;;
    install) install "$@" ;;
    run) run "$@" ;;
    train) train "$@" ;;
    status) status "$@" ;;
    logs) logs "$@" ;;
    fetch) fetch "$@" ;;
    stop) stop "$@" ;;
    delete) delete "$@" ;;
    -h | --help | help) usage ;;
    '') usage >&2 && exit 1 ;;
    *) die "there is no $what, see launch/tpu.sh --help" ;;
  esac
}
main "$@"
