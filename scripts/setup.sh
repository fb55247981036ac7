#!/usr/bin/env bash
# Creates .venv with pyvmm in it, built in release. Installs what it can; anything else is reported with the
# command to type. With "kvm" as argument it also insists on /dev/kvm.
set -eu
cd "$(dirname "$0")/.."
rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

fail() {
	echo "pyvmm: $1" >&2
	exit 1
}

# Debian packages, where this user may install them without being asked.
install_packages() {
	command -v apt-get >/dev/null || return 1
	local root=
	if [ "$(id -u)" != 0 ]; then
		sudo -n true 2>/dev/null || return 1
		root="sudo -n"
	fi
	echo "pyvmm: installing $*"
	$root apt-get -qq update >/dev/null 2>&1
	$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$@" >/dev/null 2>&1
}

has_rust() {
	local version
	version=$(rustc --version 2>/dev/null | cut -d' ' -f2) && cargo --version >/dev/null 2>&1 || return 1
	[ "$(printf '%s\n%s\n' $rust "$version" | sort -V | head -n 1)" = $rust ]
}

check_kvm() {
	[ -e /dev/kvm ] || fail "there is no /dev/kvm: enable virtualization in the firmware (for a guest: nested virtualization), then type: sudo modprobe kvm_intel || sudo modprobe kvm_amd"
	[ -r /dev/kvm ] && [ -w /dev/kvm ] || fail "no permission on /dev/kvm: type: sudo usermod -aG kvm $(id -un) and log in again"
}

[ "$(uname -sm)" = "Linux x86_64" ] || fail "pyvmm needs Linux on x86-64, this is $(uname -sm)"
[ "${1:-}" != kvm ] || check_kvm

export PATH="$HOME/.cargo/bin:$PATH"
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	fail "Python 3.11 or newer is needed: type: sudo apt-get install python3"
command -v cc >/dev/null || install_packages gcc libc6-dev || fail "a C linker is needed: type: sudo apt-get install gcc libc6-dev"
has_rust || install_packages rustc-web cargo-web || true
has_rust || fail "Rust $rust or newer is needed: type: sudo apt-get update && sudo apt-get install rustc-web cargo-web"

if [ ! -x .venv/bin/pip ]; then
	"$python" -m venv .venv >/dev/null 2>&1 || { install_packages python3-venv && "$python" -m venv --clear .venv; } ||
		fail "Python's venv is needed: type: sudo apt-get install python3-venv"
fi

pip() {
	.venv/bin/python -m pip --disable-pip-version-check -q "$@"
}

if [ ! -e .venv/packages ] || [ pyproject.toml -nt .venv/packages ]; then
	echo "pyvmm: installing Python packages into .venv"
	requirements=$("$python" - <<-'END'
		import tomllib
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]
		print("\n".join(project["dependencies"] + project["optional-dependencies"]["dev"]))
	END
	)
	echo "$requirements" | pip install -r /dev/stdin || fail "pip could not install the Python packages named above"
	touch .venv/packages
fi

if [ ! -e .venv/built ] || [ -n "$(find src Cargo.toml Cargo.lock pyproject.toml -newer .venv/built | head -n 1)" ]; then
	echo "pyvmm: building the native module"
	VIRTUAL_ENV="$PWD/.venv" .venv/bin/maturin develop --release >.venv/build.log 2>&1 || {
		cat .venv/build.log >&2
		fail "the native module could not be built, for the reason above"
	}
	touch .venv/built
fi
