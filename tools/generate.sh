#!/usr/bin/env bash
# Generates gen/go and gen/python below the given directory.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
out=${1:?usage: generate.sh DIRECTORY}
mkdir -p "$out/gen/python"
out=$(cd "$out" && pwd)
cd "$root"

tools/third-party.sh
tools/buf.sh generate --output "$out"

rm -rf "$out/gen/python"
mkdir -p "$out/gen/python"
mapfile -t protos < <(cd proto && find . -name '*.proto' | sed 's|^\./||' | LC_ALL=C sort)
# validate.proto is generated too: no Python package brings it. google.rpc comes from googleapis-common-protos.
tools/python.sh -m grpc_tools.protoc -I proto -I third_party/proto \
  --python_out="$out/gen/python" --pyi_out="$out/gen/python" buf/validate/validate.proto "${protos[@]}"
tools/python.sh -m grpc_tools.protoc -I proto -I third_party/proto \
  --grpc_python_out="$out/gen/python" outbox/v1/outbox_service.proto outbox/v1/admin_service.proto
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$out/gen/python" tools/python.sh -c \
  'import outbox.v1.outbox_service_pb2_grpc, outbox.v1.admin_service_pb2_grpc'
