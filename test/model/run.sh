#!/usr/bin/env bash
# Checks the model: the protocol as it is must hold in every world, and without any one of its rules a counterexample must be
# found. Prints a table; fails if any line is not what it must be. `run.sh -v VARIANT` prints the counterexample of one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# world | variant | what it shows ("": nothing may go wrong)
variants='
ROLLBACK           |           |
ROLLBACK RELAYCRASH|           |
PROMPT ZOMBIE      |           |
DBCRASH            |           |
SPILL PURGE        |           |
REFUSE             |           |
REUSE              |           |
WRONGVIEW          |           |
CLEAN              |           |
CLEAN FAILOVER     |           |
SKEW               |           |
WRONGVIEW          | NO_1      | rule 1: the right table, seen whole
CLEAN FAILOVER     | NO_2A     | rule 2: a marker is deleted only after its retention
CLEAN FAILOVER     | NO_2B     | rule 2: after a failover of the store "not marked" proves nothing about what is old
SPILL PURGE        | NO_3      | rule 3: the twin of a spilled request is kept
SPILL              | NO_4      | rule 4: must_spill is asked of a fresh snapshot
ROLLBACK RELAYCRASH| NO_5      | rule 5: one transaction per step of a relay
REFUSE             | NO_6      | rule 6: a redrive is done by the holder
REUSE              | NO_7      | rule 7: the digest is compared
RELAYCRASH         | NO_8      | rule 8: one record of an aggregate under way
SKEW               | NO_9      | rule 9: ids are not clocks
DBCRASH            | NAIVE_XID | the marker decides: pg_xact_status alone, and an xid that is given out again
DBCRASH            | TIMEOUT   | no decision by timeout
CLEAN              | NO_CAS    | decisions are write-once
'

# Debian has Spin; nothing else is needed but a C compiler.
spin_is_there() {
  command -v spin >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y spin; } >/dev/null 2>&1 || true
  fi
  command -v spin >/dev/null || { echo "spin is not installed: apt-get install spin"; exit 1; }
}

# check DIR WORLD VARIANT: prints "ok STATES" or "violated WHAT".
check() {
  local dir=$1 defines=()
  for m in $2 $3; do defines+=("-D$m"); done
  mkdir -p "$dir" && cd "$dir" && cp "$here/outbox.pml" .
  spin -a "${defines[@]}" outbox.pml >spin.out 2>&1 || { echo "broken"; cat spin.out >&2; return; }
  cc -w -O2 -DSAFETY -DCOLLAPSE -DMEMLIM=3000 -o pan pan.c
  ./pan -m100000 -E >pan.out 2>&1
  if grep -q 'errors: 0' pan.out && ! grep -q 'max search depth too small\|memory limit' pan.out; then
    echo "ok $(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' pan.out)"
  elif grep -q 'assertion violated' pan.out; then
    local line
    line=$(spin -t "${defines[@]}" outbox.pml 2>&1 | sed -n 's/.*outbox.pml:\([0-9]*\), Error: assertion violated.*/\1/p' | head -1)
    echo "violated $(sed -n "${line}s|.*/\* \(.*\) \*/.*|\1|p" outbox.pml)"
  else
    echo "broken"; tail -5 pan.out >&2
  fi
}

spin_is_there
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trim() { sed 's/^ *//; s/ *$//' <<<"$1"; }

if [ "${1:-}" = -v ]; then
  while IFS='|' read -r world variant shows; do
    if [ "$(trim "$variant")" = "$2" ]; then
      check "$work" "$world" "$variant"
      defines=()
      for m in $world $variant; do defines+=("-D$m"); done
      cd "$work" && spin -t -p -g -l "${defines[@]}" outbox.pml
      exit
    fi
  done <<<"$variants"
  echo "no variant $2"; exit 1
fi

# Two at a time.
n=0
while IFS='|' read -r world variant shows; do
  [ -n "$world" ] || continue
  n=$((n + 1))
  check "$work/$n" "$world" "$variant" >"$work/$n.result" &
  while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
done <<<"$variants"
wait

failed=0 n=0 started=$SECONDS
printf '%-20s %-10s %-78s %s\n' world without shows result
while IFS='|' read -r world variant shows; do
  [ -n "$world" ] || continue
  n=$((n + 1))
  variant=$(trim "$variant") shows=$(trim "$shows") result=$(cat "$work/$n.result")
  mark=' '
  if [ -z "$variant" ] && [[ $result != ok* ]] || [ -n "$variant" ] && [[ $result != violated* ]]; then
    mark='  <== not as it must be' failed=1
  fi
  printf '%-20s %-10s %-78s %s%s\n' "$(trim "$world")" "${variant:--}" "${shows:-the protocol as it is}" "$result" "$mark"
done <<<"$variants"
exit $failed
