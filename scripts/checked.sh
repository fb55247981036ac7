#!/usr/bin/env bash
# Makes target/checked/python/pyvmm: the package, whose native module has the checks of a debug
# build.
set -eu
cd "$(dirname "$0")/.."
PYO3_BUILD_EXTENSION_MODULE=1 PYO3_PYTHON="$PWD/.venv/bin/python" cargo build --quiet --profile checked --lib
mkdir -p target/checked/python
rm -rf target/checked/python/pyvmm
cp -r python/pyvmm target/checked/python/
rm -f target/checked/python/pyvmm/*.so
cp target/checked/libpyvmm.so target/checked/python/pyvmm/_pyvmm.so
