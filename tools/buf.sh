#!/usr/bin/env bash
# buf, pinned by the Go module tools/buf. A module of its own: buf needs a newer protobuf runtime than the plugins should be
# built with. Needs nothing but Go.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

install_buf() {
  say "building buf $version (once, a minute or three)"
  (cd "$root/tools/buf" && go build -o "$1/buf" github.com/bufbuild/buf/cmd/buf)
}

version=$(sed -n 's/.*github.com\/bufbuild\/buf v\([0-9.]*\).*/\1/p' "$root/tools/buf/go.mod")
bin=$cache/buf-$version
install_once "$bin" install_buf
cd "$root"
exec "$bin/buf" "$@"
