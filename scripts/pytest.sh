#!/usr/bin/env bash
# The Python tests, in four processes beside each other: those that boot Linux keep a processor
# busy, and the others often wait. What the last prints is shown as it comes, the rest at the end.
set -u
cd "$(dirname "$0")/.."
logs=$(mktemp -d)
find tests -name 'test_*.py' | sort >"$logs/files"
mapfile -t odd < <(sed -n 'p;n' "$logs/files")
mapfile -t even < <(sed -n 'n;p' "$logs/files")
names=(linux-boot linux-devices even)
pytest --quiet -m linux "$@" tests/boot tests/console >"$logs/linux-boot" 2>&1 &
running=($!)
pytest --quiet -m linux "$@" --ignore tests/boot --ignore tests/console >"$logs/linux-devices" 2>&1 &
running+=($!)
pytest --quiet -m "not linux" "$@" "${even[@]}" >"$logs/even" 2>&1 &
running+=($!)
trap 'kill "${running[@]}" 2>/dev/null; rm -rf "$logs"' EXIT
status=0
pytest --quiet -m "not linux" "$@" "${odd[@]}" || status=$?
for number in "${!running[@]}"; do
    wait "${running[$number]}" || status=$?
    cat "$logs/${names[$number]}"
done
exit "$status"
