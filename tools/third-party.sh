#!/usr/bin/env bash
# Lays the foreign .proto files that ours import into third_party/proto (not committed), out of the Go module cache.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

# lay MODULE@VERSION FILE-IN-MODULE TARGET SHA256
lay() {
  local target=$root/third_party/proto/$3 dir
  if [ -f "$target" ] && echo "$4  $target" | sha256sum --check --status; then return; fi
  dir=$(cd / && go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p')
  [ -n "$dir" ] || die "the Go module proxy did not bring $1"
  mkdir -p "$(dirname "$target")"
  install -m 644 "$dir/$2" "$target"
  echo "$4  $target" | sha256sum --check --quiet || die "$2 of $1 is not the file it was"
}

lay github.com/bufbuild/protovalidate@v1.2.2 proto/protovalidate/buf/validate/validate.proto buf/validate/validate.proto \
  a1dc1163ebac930b3b070655b91f2bc78df8b4aea940021661fe5ec7904a7b88
lay github.com/grpc-ecosystem/grpc-gateway@v1.16.0 third_party/googleapis/google/rpc/status.proto google/rpc/status.proto \
  444c68863c3efbd89db9d85233ffc169af310a174e4f06d02caed4fa5add91d8
