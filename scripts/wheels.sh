#!/usr/bin/env bash
# Builds the wheels and the source distribution into target/wheels and checks them: one wheel for
# every CPython from 3.11 on (the stable ABI), a native one for each newer interpreter that is
# installed, musl where Rust has its target. Each wheel is then installed and runs a program under
# every interpreter that it fits. PYTHONS names interpreters that are not on the PATH.
set -eu
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"
out=target/wheels
tools=target/wheel-tools
rm -rf "$out"
mkdir -p "$out"

say() {
	echo "wheels: $1"
}

if [ ! -x $tools/bin/twine ]; then
	say "installing the tools into $tools"
	.venv/bin/python -m venv $tools
	$tools/bin/pip -q install "maturin>=1.9,<2" ziglang auditwheel twine check-wheel-contents
fi
# maturin finds zig as a module of this Python.
export PATH="$PWD/$tools/bin:$PATH"

build() { # a name, then arguments of maturin
	say "building $1"
	shift
	maturin build --quiet --release --zig --out $out "$@"
}

interpreters() { # the least minor version
	for python in python3.1{1..9}{,t} ${PYTHONS:-}; do
		"$python" -c "import sys; sys.exit(sys.version_info < (3, $1))" 2>/dev/null && command -v "$python" || true
	done
}

oldest=$(interpreters 11 | head -n 1)
build "the wheel for every CPython" --features abi3 --compatibility manylinux2014 --interpreter "${oldest:-.venv/bin/python}"
for python in $(interpreters 12); do
	build "a native wheel for $python" --compatibility manylinux2014 --interpreter "$python"
done
if rustc --print target-libdir --target x86_64-unknown-linux-musl 2>/dev/null | xargs -r test -d; then
	build "the wheel for musl" --features abi3 --target x86_64-unknown-linux-musl --compatibility musllinux_1_2
else
	say "no wheel for musl: type: rustup target add x86_64-unknown-linux-musl"
fi
say "building the source distribution"
maturin sdist --out $out

twine check --strict $out/*
# Two packages: pytest loads its plugin without the other one.
check-wheel-contents --ignore W009 $out/*.whl
for wheel in "$out"/*.whl; do
	auditwheel show "$wheel" | grep -A 1 "is consistent with"
done

program='import os, pyvmm; print(pyvmm.__version__, pyvmm.Vmm().run_here(60) if os.access("/dev/kvm", os.W_OK) else "imported")'
for python in $(interpreters 11); do
	for wheel in "$out"/*manylinux*.whl; do
		test=$(mktemp -d)
		"$python" -m venv "$test"
		if "$test"/bin/pip -q install "$wheel" 2>/dev/null; then
			say "$("$python" --version), $(basename "$wheel"): $(cd "$test" && bin/python -c "$program" | tail -n 1)"
		else
			say "$("$python" --version) does not take $(basename "$wheel")"
		fi
		rm -rf "$test"
	done
done
