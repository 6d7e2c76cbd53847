#!/usr/bin/env bash
# buf breaking against a git revision: BASE, else origin/main, else main.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
cd "$root"
base=${BASE:-}
[ -n "$base" ] || base=$(git rev-parse --quiet --verify --symbolic-full-name origin/main || git rev-parse --quiet --verify --symbolic-full-name main) ||
  die "there is neither origin/main nor main to compare with: name a revision, BASE=… make lint"
tools/third-party.sh
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# Not '.git#branch=…': the foreign protos are not in git.
git archive "$base" proto buf.yaml | tar -x -C "$tmp"
cp -r third_party "$tmp/"
tools/buf.sh breaking --against "$tmp"
say "no breaking change of the API against $base"
