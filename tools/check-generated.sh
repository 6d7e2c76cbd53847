#!/usr/bin/env bash
# Fails, with the difference, when gen/ or the Python SDK's _gen is not what the protos say or a proto is not formatted.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$root"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
tools/generate.sh "$tmp"
diff -r --exclude=__pycache__ "$tmp/gen" gen >&2 || die "gen/ is not current: run 'make generate' and commit it"
sdk=client/python/src/outbox_client/_gen
diff -r --exclude=__pycache__ "$tmp/$sdk" "$sdk" >&2 || die "$sdk is not current: run 'make generate' and commit it"
tools/buf.sh format --diff --exit-code proto || die "a proto is not formatted: run 'make generate' and commit it"
say "generated code is current"
