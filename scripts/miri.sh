#!/bin/sh
# Interprets Rust tests with Miri, with few cases of each property: miri.sh FILTER... If Miri is not
# installed, one line says so.
if ! cargo +nightly miri --version >/dev/null 2>&1; then
	echo "pyvmm: the nightly Rust has no Miri, left out: cargo miri test $*" >&2
	exit 0
fi
PROPTEST_CASES=4 PROPTEST_FAILURE_PERSISTENCE=off MIRIFLAGS=-Zmiri-disable-isolation \
	exec cargo +nightly miri test --quiet --no-default-features --lib --target-dir target/miri -- "$@"
