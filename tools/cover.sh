#!/usr/bin/env bash
# Prints statement coverage per package from a profile whose blocks may occur once per test binary; fails below the promise of
# 85 % for store, relay, server and client.
set -euo pipefail
awk 'NR > 1 && $1 !~ /\/(storetest|relaytest)\// {
       if (!($1 in statements)) statements[$1] = $2
       if ($3 > 0) hit[$1] = 1
     }
     END {
       for (block in statements) {
         package = block; sub(/\/[^\/]*$/, "", package); sub(/^github.com\/outbox-platform\/outbox\//, "", package)
         total[package] += statements[block]
         if (block in hit) covered[package] += statements[block]
       }
       for (package in total) {
         percent = 100 * covered[package] / total[package]
         printf "%-24s %5.1f %% of %d statements\n", package, percent, total[package]
         if (package ~ /^(store|relay|server|client)$/ && percent < 85) low = low " " package
       }
       if (low != "") { print "below 85 %:" low; exit 1 }
     }' "${1:?usage: cover.sh PROFILE}"
