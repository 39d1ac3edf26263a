# shellcheck shell=bash
# What tpu/slice and tpu/gke share: one-line errors, commands that are run or only printed, and the
# checkout as a file. Sourced, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/jaxalign
MOUNT=/mnt/jaxalign # where every host sees the bucket
dry_run=

# One line on standard error, and exit status 2: something the user can mend.
refuse() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# A line for people; standard output is left to commands and their answers.
say() {
  echo "${0##*/}: $*" >&2
}

# The words of a command so that a shell, here or on a host, reads the same words again.
quoted() {
  local word line='' escape="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/$escape}'" ;;
    esac
    line+=" $word"
  done
  echo "${line# }"
}

# Run a command, or print it.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# The value of a flag, which has to be there: value FLAG COUNT-OF-ARGUMENTS-LEFT
needs_value() {
  (($2 > 1)) || refuse "$1: a value is missing"
}

# A setting that has to be there: setting VALUE FLAG VARIABLE EXAMPLE
setting() {
  [[ -n $1 ]] || refuse "$2 is missing: give it, or set $3, e.g. $2 $4"
}

# The bucket's name without gs:// before and / after it.
bucket_name() {
  local name=${1#gs://}
  echo "${name%/}"
}

# What is trained: an experiment of this checkout, and flags that leave the output alone.
check_run() {
  local word
  (($# > 0)) || refuse "the experiment is missing: end with EXPERIMENT [flags of jaxalign train]"
  if [[ ${1%:*} == *.py && ! -e $ROOT/${1%:*} ]]; then
    refuse "${1%:*}: there is no such file in $ROOT; give its path from there"
  fi
  for word in "$@"; do
    case $word in
      --output | --output=*) refuse "--output: runs go to $MOUNT/runs, the bucket; leave it out" ;;
    esac
  done
}

# The commit that is checked out, with its history, as the file $CACHE/$1/jaxalign.bundle: the hosts
# clone it, so that a run's environment.json names the revision that ran.
bundle() {
  if [[ -z $dry_run && -n $(git -C "$ROOT" status --porcelain) ]]; then
    refuse "$ROOT: there are changes that are not committed; commit them, since hosts run a commit"
  fi
  run mkdir -p "$CACHE/$1" &&
    run git -C "$ROOT" bundle create --quiet "$CACHE/$1/jaxalign.bundle" HEAD
}
