#!/usr/bin/env bash
# The Python tests. Those that boot Linux keep one processor busy for minutes: they run beside the
# others, and what they print follows at the end.
set -u
cd "$(dirname "$0")/.."
log=$(mktemp)
pytest --quiet -m linux "$@" >"$log" 2>&1 &
linux=$!
trap 'kill "$linux" 2>/dev/null; rm -f "$log"' EXIT
status=0
pytest --quiet -m "not linux" "$@" || status=$?
echo "pyvmm: the tests that boot Linux"
wait "$linux" || status=$?
cat "$log"
exit "$status"
