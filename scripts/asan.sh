#!/usr/bin/env bash
# Runs Python tests with a native module built with AddressSanitizer: asan.sh ARGUMENTS_OF_PYTEST.
# The toolchain's sanitizer runtime is linked into a library that is loaded before Python. If the
# toolchain does not allow this, one line says so.
set -eu
cd "$(dirname "$0")/.."
target=x86_64-unknown-linux-gnu
out=target/asan

left_out() {
	echo "pyvmm: $1, left out: AddressSanitizer" >&2
	exit 0
}

lib=$(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/$target/lib || left_out "no nightly Rust is installed"
[ -e "$lib/librustc-nightly_rt.asan.a" ] || left_out "the nightly Rust has no AddressSanitizer"
mkdir -p $out/python

# A library has no start of a program that could initialize the runtime, so its constructor does.
# The runtime would take a library of its usual name for another runtime.
cp "$lib/librustc-nightly_rt.asan.a" $out/runtime.a
ar d $out/runtime.a asan_preinit.cpp.o
cc -shared -o $out/libsanitizer.so -Wl,--whole-archive $out/runtime.a -Wl,--no-whole-archive -lpthread -ldl -lm -lrt 2>$out/link.log ||
	left_out "AddressSanitizer's runtime cannot be made a library ($out/link.log says why)"

PYO3_BUILD_EXTENSION_MODULE=1 PYO3_PYTHON="$PWD/.venv/bin/python" \
	RUSTFLAGS="-Zsanitizer=address -Zexternal-clangrt -Cforce-frame-pointers=yes" \
	cargo +nightly build --quiet --lib --profile checked --target $target --target-dir $out
rm -rf $out/python/pyvmm
cp -r python/pyvmm $out/python/
rm -f $out/python/pyvmm/*.so
cp $out/$target/checked/libpyvmm.so $out/python/pyvmm/_pyvmm.so

# Python allocates its objects from the system's heap, so that overruns are detected there too.
# Other tests detect leaks.
export LD_PRELOAD="$PWD/$out/libsanitizer.so" PYTHONPATH="$PWD/$out/python" PYTHONMALLOC=malloc
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:abort_on_error=1:detect_stack_use_after_return=0"
python -c "import pyvmm._pyvmm as module; assert 'asan' in module.__file__, module.__file__"
exec pytest --quiet "$@"
