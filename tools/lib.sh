# Sourced by the tool wrappers. Tools are pinned, and built or fetched once into a cache outside the repository that is
# keyed by version: OUTBOX_TOOLS, else $XDG_CACHE_HOME/outbox-tools, else ~/.cache/outbox-tools.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${OUTBOX_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/outbox-tools}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# install_once DIR COMMAND…: runs COMMAND with an empty staging directory as its last argument and renames that directory to
# DIR, so that a broken-off install is never taken for a finished one. One at a time, where flock exists.
install_once() {
  local dir=$1 staging
  shift
  [ -d "$dir" ] && return
  mkdir -p "$(dirname "$dir")"
  if command -v flock >/dev/null; then
    exec 9>"$dir.lock"
    flock 9
    if [ -d "$dir" ]; then exec 9>&-; return; fi
  fi
  staging=$(mktemp -d "$dir.XXXXXX")
  if ! "$@" "$staging"; then
    rm -rf "$staging"
    die "installing $(basename "$dir") did not work; the output above says why"
  fi
  chmod 755 "$staging"
  mv "$staging" "$dir"
  if command -v flock >/dev/null; then exec 9>&-; fi
}
