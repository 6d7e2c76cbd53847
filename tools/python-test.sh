#!/usr/bin/env bash
# Every test of the Python SDK on one version of Python, with coverage, and the part that needs no services on all others that are on
# this machine. Needs bin/outbox.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$root"
[ -x bin/outbox ] || die "bin/outbox is missing: run 'make build'"
full=$(tools/python-sdk.sh default python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
say "Python $full: everything"
tools/python-sdk.sh "$full" coverage run -m pytest -q --durations=5 "$@"
tools/python-sdk.sh "$full" coverage report --skip-covered --fail-under=90 >&2
tools/python-sdk.sh "$full" coverage report --fail-under=100 --include="$(paste -sd, client/python/covered-paths.txt)" >&2
say "Python $full: the File Service example"
tools/python-sdk.sh "$full" env PYTHONPATH=src:../../examples/file-service/src \
  python -m pytest -q -c ../../examples/file-service/pyproject.toml ../../examples/file-service/tests
found=$(tools/python-sdk.sh versions)
for version in 3.10 3.11 3.12 3.13; do
  if [ "$version" = "$full" ]; then continue; fi
  if ! grep -qx "$version" <<<"$found"; then
    say "Python $version is not on this machine: NOT tested"
    continue
  fi
  say "Python $version: the unit tests"
  tools/python-sdk.sh "$version" python -m pytest -q -m unit
done
