# shellcheck shell=bash
# What tpu.sh, gke.sh and worker.sh share: options, errors, the plan of --dry-run. It is sourced, never run.
#
# A command line fills:
#   opt[NAME]      each option that was given, --NAME=VALUE, --NAME VALUE or --NAME (then "yes")
#   positional[]   what is no option
#   environment[]  the values of --env, which may be given several times
#   rest[]         what follows a lone --
set -euo pipefail
# shellcheck disable=SC2034  # rest and environment are read by those who source this
declare -A opt=()
positional=() environment=() rest=()
exec 3>&1 # where a plan is printed, also from inside $(...)

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

if [ "${BASH_VERSINFO[0]}" -lt 4 ] || { [ "${BASH_VERSINFO[0]}" = 4 ] && [ "${BASH_VERSINFO[1]}" -lt 4 ]; }; then
  die "bash $BASH_VERSION is too old, 4.4 or newer is needed (macOS: brew install bash, or use Cloud Shell)"
fi

# The comment at the head of a script is its --help.
usage() { sed -n '2,/^[^#]/{/^# shellcheck/d;s/^# \{0,1\}//p}' "$0"; }

# parse_options "FLAG ..." "OPTION ..." ARGUMENT ...; a FLAG takes no value, an OPTION takes one.
parse_options() {
  local flags=" $1 " options=" $2 " key value
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      --)
        shift
        # shellcheck disable=SC2034
        rest=("$@")
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --*)
        key=${1#--} value=
        [ "$key" = "${key%%=*}" ] || value=${key#*=}
        if [[ $flags == *" ${key%%=*} "* ]]; then
          [ "$key" = "${key%%=*}" ] || die "--${key%%=*} takes no value"
          opt[$key]=yes
        elif [[ $options == *" ${key%%=*} "* ]]; then
          if [ "$key" = "${key%%=*}" ] && [ $# -gt 1 ]; then
            value=$2
            shift
          fi
          [ -n "$value" ] || die "--${key%%=*} needs a value"
          opt[${key%%=*}]=$value
          [ "${key%%=*}" != env ] || environment+=("$value")
        else
          die "there is no option --${key%%=*} here, see --help"
        fi
        ;;
      *) positional+=("$1") ;;
    esac
    shift
  done
}

# want_number OPTION: a whole number, where it is given.
want_number() {
  [[ -z ${opt[$1]-} || ${opt[$1]} =~ ^[0-9]+$ ]] || die "--$1=${opt[$1]}: expected a whole number"
}

dry() { [ -n "${opt[dry-run]-}" ]; }

# The words of a command so that a shell reads them back; plain words stay plain.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# plan COMMAND ...: runs it; with --dry-run only prints it.
plan() {
  if dry; then
    printf '%s%s\n' "$indent" "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

# plan_line LINE: the same for a line of shell, with its pipes and redirections.
plan_line() {
  if dry; then
    printf '%s%s\n' "$indent" "$1" >&3
  else
    eval "$1"
  fi
}

# A line of a plan that is no command. What depends on it is further in: local indent="$indent  ".
remark() { if dry; then printf '%s# %s\n' "$indent" "$*" >&3; fi; }
indent=

say() { dry || printf '%s %s\n' "$(date +%T)" "$*"; }

# need PROGRAM WHERE_FROM: nothing is needed for a dry run.
need() { dry || command -v "$1" >/dev/null || die "$1 is not on PATH: $2"; }

# booking NAME: what a booked name means, as shell assignments, see booking.py.
booking() {
  local out
  command -v python3 >/dev/null || die "python3 is not on PATH: it reads the names of slices"
  # -S: no packages are needed, and without them it starts at once.
  out=$(python3 -S "$(dirname "${BASH_SOURCE[0]}")/booking.py" "$@") || exit 1
  printf '%s\n' "$out"
}
