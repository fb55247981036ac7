#!/usr/bin/env bash
# Builds the wheels and the source distribution into target/wheels, and checks them: for glibc and
# for musl one wheel for every CPython from 3.11 on (the stable ABI), and native ones for newer
# interpreters, also where the interpreter itself is not installed. `try_wheels.sh` then installs
# each of them. What cannot be made or checked here is said in one line. Arguments:
# the parts to build, from abi3, musl, sdist and versions such as 3.14 or 3.14t; all by default.
set -eu
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"
out=target/wheels
tools=target/wheel-tools
musl=x86_64-unknown-linux-musl
wanted=${*:-abi3 musl 3.12 3.13 3.14 3.14t sdist}
rm -rf "$out"
mkdir -p "$out"

say() {
	echo "wheels: $1"
}

if [ ! -x $tools/bin/uv ]; then
	say "installing the tools into $tools"
	.venv/bin/python -m venv $tools
	$tools/bin/pip -q install "maturin>=1.9,<2" ziglang auditwheel twine check-wheel-contents uv
fi
# maturin finds zig as a module of this Python.
export PATH="$PWD/$tools/bin:$PATH"
unset VIRTUAL_ENV

# No paths of this machine in the panic messages, and the time of the commit in the archives.
export RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$HOME/.cargo/registry/src=crates --remap-path-prefix=$PWD=pyvmm"
if committed=$(git log -1 --format=%ct 2>/dev/null); then
	export SOURCE_DATE_EPOCH=$committed
fi

build() { # a name, then arguments of maturin
	say "building $1"
	shift
	maturin build --quiet --locked --release --zig --out $out "$@" >$tools/log 2>&1 || { cat $tools/log >&2; exit 1; }
}

for part in $wanted; do
	case $part in
	abi3) build "the wheel for every CPython" --features abi3 --compatibility manylinux2014 --interpreter .venv/bin/python ;;
	musl)
		if rustc --print target-libdir --target $musl 2>/dev/null | xargs -r test -d; then
			build "the wheel for every CPython on musl" --features abi3 --target $musl --compatibility musllinux_1_2
		else
			say "left out: the wheel for musl; type: rustup target add $musl"
		fi
		;;
	3.*) build "the wheel for CPython $part" --target x86_64-unknown-linux-gnu --compatibility manylinux2014 --interpreter "$part" ;;
	sdist)
		say "building the source distribution"
		maturin sdist --out $out >$tools/log 2>&1 || { cat $tools/log >&2; exit 1; }
		;;
	*)
		say "there is no part $part"
		exit 2
		;;
	esac
done

.venv/bin/python scripts/packages.py $out
find $out -name "*.whl" -o -name "*.tar.gz" | xargs twine check --strict
# W009: two packages; pytest loads its plugin without the other one.
find $out -name '*.whl' -exec check-wheel-contents --ignore W009 {} +
for wheel in "$out"/*-manylinux*.whl; do
	[ ! -e "$wheel" ] || auditwheel show "$wheel" | tr '\n' ' ' | grep -q 'is consistent with.*"manylinux_2_17_x86_64"' ||
		{ say "$(basename "$wheel") does not run on every manylinux_2_17"; exit 1; }
done

scripts/try_wheels.sh $out $tools
