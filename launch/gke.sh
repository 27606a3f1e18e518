#!/usr/bin/env bash
# TPU slices on GKE, several of them as one job (multislice): an image, node pools, a JobSet.
#
#   launch/gke.sh image --image=REGION-docker.pkg.dev/PROJECT/REPO/vflax:TAG     builds this checkout, pushes it
#   launch/gke.sh pools NAME --accelerator=2xv5e-256 --cluster=C --location=L [--node-location=ZONE] [--spot]
#   launch/gke.sh render NAME --accelerator=2xv5e-256 --image=I [--bucket=gs://B | --claim=PVC] [--mount=/mnt/vflax]
#                 [--namespace=default] [--service-account=default] [--max-restarts=10] [--env=NAME=VALUE ...] [--secret=S]
#                 -- --config=configs/stage1.py:13b --workdir=gs://B/runs/a --config.mesh.data=2 ...
#                 prints the manifest; a --workdir under --mount needs --bucket or --claim, mesh.data a multiple of the slices;
#                 --env is a variable that the run finds; --secret a Kubernetes Secret of them, for what others may not read
#   launch/gke.sh apply NAME ...           the same, and hands it to the cluster
#   launch/gke.sh status NAME [--namespace=N]
#   launch/gke.sh logs NAME [--slice=0] [--worker=0] [--all] [--lines=50] [--follow] [--namespace=N]
#   launch/gke.sh delete NAME [--yes] [--namespace=N]
#   launch/gke.sh delete-pools NAME --accelerator=2xv5e-256 --cluster=C --location=L [--yes]
#
# Each takes --dry-run, which prints the exact commands and runs none; those that call gcloud take --project, those
# that call kubectl take --context (default: the tools' own configuration). Node pools cost money until delete-pools.
# The cluster needs JobSet (jobset.sigs.k8s.io); how to make one: docs/pods.md.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT

want_name() {
  name=${positional[0]-}
  [ -n "$name" ] || die "give the NAME of the run, see --help"
  [ "${#positional[@]}" = 1 ] || die "one NAME, not ${positional[*]} (options of the run follow a lone --)"
  [[ $name =~ ^[a-z]([a-z0-9-]{0,37}[a-z0-9])?$ ]] || die "$name: a name has up to 39 small letters, digits and dashes"
}

want() { [ -n "${opt[$1]-}" ] || die "give --$1, see --help"; }

begin_kubectl() {
  need kubectl "gcloud components install kubectl, then gcloud container clusters get-credentials CLUSTER --location=L"
  kubectl=(kubectl ${opt[context]:+--context="${opt[context]}"} --namespace="${opt[namespace]-default}")
}

begin_pools() {
  local line key value
  want accelerator
  want cluster
  want location
  need gcloud "install the Google Cloud CLI, cloud.google.com/sdk/docs/install, or use Cloud Shell"
  line=$(booking "${opt[accelerator]}") || exit 1
  while IFS='=' read -r key value; do booked[$key]=$value; done <<<"$line"
  line=$name-$((booked[slices] - 1))
  [ "${#line}" -le 40 ] || die "$line, the last node pool, has ${#line} characters, and GKE allows 40: give a shorter NAME"
  pool_where=(--cluster="${opt[cluster]}" --location="${opt[location]}" ${opt[project]:+--project="${opt[project]}"})
}
declare -A booked=()

# A pipe is one command of the plan: the context is the last commit, nothing that lies about.
image() {
  local root
  parse_options "dry-run" "image" "$@"
  want image
  root=$(dirname "$folder")
  need docker "docs.docker.com/get-docker, or use Cloud Shell"
  need git "it packs this checkout"
  git -C "$root" rev-parse --verify -q HEAD >/dev/null || die "$root is not a git checkout: clone the repository"
  plan_line "$(quoted git -C "$root" archive HEAD) |\
 $(quoted docker build --file=launch/Dockerfile --tag="${opt[image]}" -)" || die "docker did not build the image"
  plan docker push "${opt[image]}" || die "docker did not push ${opt[image]}: gcloud auth configure-docker HOST lets it"
}

# A node pool is one slice: all its nodes or none.
pools() {
  local number command
  parse_options "spot dry-run" "accelerator cluster location node-location project" "$@"
  want_name
  begin_pools
  for ((number = 0; number < booked[slices]; number++)); do
    command=(gcloud container node-pools create "$name-$number" "${pool_where[@]}"
      --machine-type="${booked[machine]}" --num-nodes="${booked[nodes]}")
    # A slice of one host has no topology to ask for.
    [ "${booked[nodes]}" = 1 ] || command+=(--tpu-topology="${booked[topology]}")
    [ -z "${opt[node-location]-}" ] || command+=(--node-locations="${opt[node-location]}")
    [ -z "${opt[spot]-}" ] || command+=(--spot)
    plan "${command[@]}" --quiet ||
      die "node pool $name-$number was not made (quota and zones: docs/pods.md); delete-pools removes those that were"
  done
  say "$name: ${booked[chips]} chips in ${booked[slices]} node pools, which cost money until launch/gke.sh delete-pools"
}

render_options="accelerator image bucket claim mount namespace service-account max-restarts secret"

# Prints the manifest.
manifest() {
  local option command=(python3 "$folder/render_jobset.py" "$name")
  want_name
  want accelerator
  want image
  want_number max-restarts
  for option in $render_options; do
    [ -z "${opt[$option]-}" ] || command+=(--"$option=${opt[$option]}")
  done
  for option in "${environment[@]}"; do command+=(--env="$option"); done
  "${command[@]}" -- "${rest[@]}"
}

render() {
  parse_options "dry-run" "$render_options env" "$@"
  want_name
  manifest
}

apply() {
  parse_options "dry-run" "$render_options env context" "$@"
  want_name
  begin_kubectl
  scratch=$(mktemp -d)
  manifest >"$scratch/jobset.yaml" || exit 1
  if dry; then
    printf '%s\n' "$(quoted "${kubectl[@]}" apply --filename=-) <<'EOF'" >&3
    cat "$scratch/jobset.yaml" >&3
    echo EOF >&3
    return
  fi
  "${kubectl[@]}" apply --filename="$scratch/jobset.yaml" ||
    die "the cluster did not take the JobSet (is JobSet installed in it? docs/pods.md)"
  say "$name: handed over. Follow it: launch/gke.sh logs $name --follow"
}

status() {
  parse_options "dry-run" "namespace context" "$@"
  want_name
  begin_kubectl
  plan "${kubectl[@]}" get jobset "$name" || die "there is no JobSet $name in this namespace and cluster"
  plan "${kubectl[@]}" get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

logs() {
  local selector
  parse_options "all follow dry-run" "slice worker lines namespace context" "$@"
  want_number slice
  want_number worker
  want_number lines
  want_name
  begin_kubectl
  selector=jobset.sigs.k8s.io/jobset-name=$name
  if [ -z "${opt[all]-}" ]; then
    selector+=,jobset.sigs.k8s.io/job-index=${opt[slice]-0},batch.kubernetes.io/job-completion-index=${opt[worker]-0}
  fi
  plan "${kubectl[@]}" logs --selector="$selector" --container=vflax --prefix --max-log-requests=1024 \
    --tail="${opt[lines]-50}" ${opt[follow]:+--follow} || die "no log could be read"
}

sure() {
  local answer
  if dry || [ -n "${opt[yes]-}" ]; then return; fi
  read -r -p "$1 [y/N] " answer || true
  [[ ${answer-} == [yY]* ]] || die "not deleted"
}

delete() {
  parse_options "yes dry-run" "namespace context" "$@"
  want_name
  begin_kubectl
  sure "delete the JobSet $name and its Pods?"
  plan "${kubectl[@]}" delete jobset "$name" || die "the JobSet $name was not deleted"
  say "$name: deleted; its node pools go on costing money until launch/gke.sh delete-pools"
}

delete_pools() {
  local number left=''
  parse_options "yes dry-run" "accelerator cluster location project" "$@"
  want_name
  begin_pools
  sure "delete the ${booked[slices]} node pools of $name with their nodes?"
  for ((number = 0; number < booked[slices]; number++)); do
    plan gcloud container node-pools delete "$name-$number" "${pool_where[@]}" --quiet || left+=" $name-$number"
  done
  [ -z "$left" ] || die "not deleted:$left: look at them in the console, they may go on costing money"
  say "$name: node pools deleted"
}

main() {
  local what=${1-}
  shift || true
  case $what in
    image) image "$@" ;;
    pools) pools "$@" ;;
    render) render "$@" ;;
    apply) apply "$@" ;;
    status) status "$@" ;;
    logs) logs "$@" ;;
    delete) delete "$@" ;;
    delete-pools) delete_pools "$@" ;;
    -h | --help | help) usage ;;
    '') usage >&2 && exit 1 ;;
    *) die "there is no $what, see launch/gke.sh --help" ;;
  esac
}
main "$@"
