#!/usr/bin/env bash
# golangci-lint, pinned and built with the local Go, so that it never lags behind the language version.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
version=2.15.0

install_lint() {
  say "building golangci-lint $version (once, about three minutes)"
  (cd / && GOBIN=$1 go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$version")
}

bin=$cache/golangci-lint-$version-$(go env GOVERSION)
install_once "$bin" install_lint
cd "$root"
exec "$bin/golangci-lint" "$@"
