#!/usr/bin/env bash
# Installs each wheel of a folder in a fresh environment of every interpreter that it fits, and runs
# the first program there; then the same with the source distribution, built without a network.
# Arguments: the folder, and that of the tools. Interpreters are those on the PATH and pyenv's;
# PYTHONS names others.
set -eu
shopt -s inherit_errexit # a failure in $(...) is one
out=$(realpath "$1")
uv=$(realpath "$2")/bin/uv
root=$(realpath "$(dirname "$0")/..")
# The certificates of the system, as pip and cargo use them.
export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1

say() {
	echo "wheels: $1"
}

# Each interpreter once, as "ABI LIBC PATH": "cp314t gnu /usr/bin/python3.14t".
interpreters() {
	local python
	for python in python3.1{1..9}{,t} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3.1[1-9]{,t} ${PYTHONS:-}; do
		"$python" - 2>/dev/null <<-'END' || true
			import sys
			import sysconfig
			libc = "musl" if "musl" in sysconfig.get_config_var("SOABI") else "gnu"
			abi = f"cp3{sys.version_info.minor}{'t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''}"
			if sys.version_info >= (3, 11) and sys.prefix == sys.base_prefix:
			    print(abi, libc, sys.executable)
		END
	done | sort -u -t ' ' -k 1,2
}

# Whether an interpreter of this ABI and C library can install the wheel.
fits() {
	case $3 in
	*-manylinux*) [ "$2" = gnu ] || return 1 ;;
	*-musllinux*) [ "$2" = musl ] || return 1 ;;
	esac
	case $3 in
	*-abi3-*) [ "${1%t}" = "$1" ] ;;
	*-"${1%t}-$1"-*) true ;;
	*) false ;;
	esac
}

program='
import importlib.metadata, os, pathlib, runpy, sys, pyvmm
assert pathlib.Path(pyvmm.__file__).is_relative_to(sys.prefix), pyvmm.__file__
assert importlib.metadata.version("pyvmm-kvm") == pyvmm.__version__
assert importlib.metadata.entry_points(group="pytest11")["pyvmm"].load
if os.access("/dev/kvm", os.R_OK | os.W_OK):
    runpy.run_path(sys.argv[1])
else:
    print("imported; there is no /dev/kvm for its first program")
'

try() { # an interpreter, what to install, then arguments of uv
	local test
	test=$(mktemp -d)
	"$uv" venv -q --python "$1" "$test"
	"$uv" pip install -q --python "$test/bin/python" "${@:3}" "$2"
	(cd "$test" && PYTHONPATH= bin/python -c "$program" "$root/examples/first_program.py")
	rm -rf "$test"
}

found=$(interpreters)
for wheel in "$out"/*.whl; do
	[ -e "$wheel" ] || continue
	tried=0
	while read -r abi libc python; do
		[ -n "$abi" ] && fits "$abi" "$libc" "$(basename "$wheel")" || continue
		result=$(try "$python" "$wheel" </dev/null)
		say "$(basename "$wheel") under $("$python" --version) ($abi, $libc): $(echo "$result" | tail -n 1)"
		tried=1
	done <<<"$found"
	[ $tried = 1 ] || say "not tried: $(basename "$wheel"): no interpreter for it is installed; PYTHONS=/path/to/python names one"
done

# From the source, with the crates that cargo has and without a network, where that can be arranged.
for source in "$out"/*.tar.gz; do
	[ -e "$source" ] || continue
	alone=
	! unshare --net true 2>/dev/null || alone="unshare --net"
	export CARGO_NET_OFFLINE=true CARGO_TARGET_DIR="$root/target/sdist"
	say "installing $(basename "$source") ${alone:+without a network, }without build isolation"
	test=$(mktemp -d)
	"$root/.venv/bin/python" -m venv "$test"
	site=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	PYTHONPATH=$site PATH="$root/.venv/bin:$PATH" $alone "$test/bin/python" -m pip --disable-pip-version-check \
		install -q --no-index --no-build-isolation --no-deps "$source"
	result=$(cd "$test" && PYTHONPATH=$site bin/python -c "$program" "$root/examples/first_program.py")
	say "$(basename "$source") under $("$test/bin/python" --version): $(echo "$result" | tail -n 1)"
	rm -rf "$test"
done
