#!/usr/bin/env bash
# Python with the pinned, hash-checked packages of tools/python/requirements.txt, in a virtual environment of its own.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

install_venv() {
  # A virtual environment cannot be moved: it is made where it will stay, and the marker says that it is whole.
  say "making the Python environment (once)"
  python3 -m venv --clear "$venv" >&2 || die "python3 with the venv module is needed (Debian: apt-get install python3-venv)"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
    -r "$root/tools/python/requirements.txt" >&2
}

command -v python3 >/dev/null || die "python3 is needed to generate the Python code"
key=$(cat "$root/tools/python/requirements.txt" <(python3 --version) | sha256sum | cut -c1-12)
venv=$cache/python-$key
install_once "$venv.done" install_venv
exec "$venv/bin/python" "$@"
