#!/usr/bin/env bash
# Every test of the Python SDK on the newest version of Python that is on this machine, with coverage, and the part that needs no
# services on all others. Needs bin/outbox.
#
# Not on 3.11 where there is a newer one: it was seen to loop for ever in code that is traced, as for coverage, and run by a pending
# call (greenlet's, for a thread that has ended) while another one is pending (of a second thread). Its eval loop looks for pending
# calls before it steps over a traced RESUME, does nothing as one is under way, and looks again. 3.12 traces in another way.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$root"
[ -x bin/outbox ] || die "bin/outbox is missing: run 'make build'"
found=$(tools/python-sdk.sh versions)
full=$(tail -n 1 <<<"$found")
[ -n "$full" ] || die "no Python that the SDK supports is on this machine"
say "Python $full: everything"
tools/python-sdk.sh "$full" coverage run -m pytest -q --durations=5 "$@"
tools/python-sdk.sh "$full" coverage report --skip-covered --fail-under=90 >&2
tools/python-sdk.sh "$full" coverage report --fail-under=100 --include="$(paste -sd, client/python/covered-paths.txt)" >&2
say "Python $full: the File Service example"
tools/python-sdk.sh "$full" env PYTHONPATH=src:../../examples/file-service/src \
  python -m pytest -q -c ../../examples/file-service/pyproject.toml ../../examples/file-service/tests
for version in 3.10 3.11 3.12 3.13; do
  if [ "$version" = "$full" ]; then continue; fi
  if ! grep -qx "$version" <<<"$found"; then
    say "Python $version is not on this machine: NOT tested"
    continue
  fi
  say "Python $version: the unit tests"
  tools/python-sdk.sh "$version" python -m pytest -q -m unit
done
