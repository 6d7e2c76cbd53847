#!/usr/bin/env bash
# Generates gen/go, gen/python and the Python SDK's _gen below the given directory.
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

# The Python SDK has its own copy, as a part of its package, without the admin service and without validation rules.
sdk=$out/client/python/src/outbox_client/_gen
sdk_protos=(outbox/v1/{error_reason,event,outbox_service,transaction}.proto)
rm -rf "$sdk"
mkdir -p "$sdk"
descriptors=$(mktemp -d)
trap 'rm -rf "$descriptors"' EXIT
tools/python.sh -m grpc_tools.protoc -I proto -I third_party/proto --include_imports \
  --descriptor_set_out="$descriptors/all.binpb" "${sdk_protos[@]}"
tools/python.sh tools/python/strip_validation.py "$descriptors/all.binpb" "$descriptors/stripped.binpb"
tools/python.sh -m grpc_tools.protoc --descriptor_set_in="$descriptors/stripped.binpb" \
  --python_out="$sdk" --pyi_out="$sdk" "${sdk_protos[@]}"
tools/python.sh tools/python/own_imports.py "$sdk"
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$out/client/python/src" tools/python.sh -c \
  'import outbox_client._gen.outbox.v1.outbox_service_pb2'
