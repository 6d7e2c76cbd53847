#!/usr/bin/env bash
# Runs a command in client/python with the pinned, hash-checked packages of its requirements-dev.txt, in a virtual environment of its
# own for each version of Python:
#   python-sdk.sh VERSION COMMAND…     VERSION such as 3.12, or "default": python3, or the newest that is new enough
#   python-sdk.sh versions             lists the supported versions that are on this machine
set -euo pipefail
. "$(dirname "$0")/lib.sh"
supported="3.10 3.11 3.12 3.13"

# interpreter VERSION: prints its path. Names in PATH come first (one that does not start, such as a shim of pyenv, is none).
interpreter() {
  local candidate
  for candidate in "python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python "/opt/python/$1/bin/python"; do
    if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

default_version() {
  local version newest=
  version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  case " $supported " in *" $version "*) echo "$version"; return ;; esac
  for version in $supported; do if interpreter "$version" >/dev/null; then newest=$version; fi; done
  [ -n "$newest" ] || die "no Python of $supported is on this machine"
  echo "$newest"
}

install_packages() {
  # A virtual environment cannot be moved: it is made where it will stay, and the marker says that it is whole.
  say "making the environment of the Python SDK for Python $version (once)"
  "$root/tools/python.sh" -m uv venv --quiet --clear --no-python-downloads --python "$python" "$venv" >&2
  "$root/tools/python.sh" -m uv pip install --quiet --python "$venv/bin/python" --no-build --require-hashes \
    -r "$root/client/python/requirements-dev.txt" >&2
}

if [ "${1:-}" = versions ]; then
  for version in $supported; do if interpreter "$version" >/dev/null; then echo "$version"; fi; done
  exit
fi
version=${1:?usage: python-sdk.sh VERSION COMMAND…}
shift
if [ "$version" = default ]; then version=$(default_version); fi
python=$(interpreter "$version") || die "Python $version is not on this machine"
key=$(cat "$root/client/python/requirements-dev.txt" <("$python" -VV) | sha256sum | cut -c1-12)
venv=$cache/python-sdk-$version-$key
install_once "$venv.done" install_packages
cd "$root/client/python"
PATH=$venv/bin:$PATH PYTHONPATH=src exec "$@"
