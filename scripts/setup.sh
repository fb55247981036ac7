#!/usr/bin/env bash
# Creates .venv with a release build of pyvmm in it. Installs what it can, and says so first;
# anything else is reported with the command to type. Arguments: "run" installs only what pyvmm
# needs to run, not its tests; "kvm" requires /dev/kvm. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
wanted=" $* "

fail() {
	echo "pyvmm: $1" >&2
	exit 1
}

# The command that installs python, cc or rust with the package manager of this system.
command_for() {
	local manager
	for manager in apt-get dnf pacman apk; do
		command -v $manager >/dev/null && break || manager=
	done
	case "$manager $1" in
	"apt-get python") echo "apt-get install python3 python3-venv" ;;
	"apt-get cc") echo "apt-get install gcc libc6-dev" ;;
	"apt-get rust") echo "apt-get install rustc-web cargo-web" ;;
	"dnf python") echo "dnf install python3" ;;
	"dnf cc") echo "dnf install gcc" ;;
	"dnf rust") echo "dnf install rust cargo" ;;
	"pacman python") echo "pacman -S python" ;;
	"pacman cc") echo "pacman -S gcc" ;;
	"pacman rust") echo "pacman -S rust" ;;
	"apk python") echo "apk add python3" ;;
	"apk cc") echo "apk add gcc musl-dev" ;;
	"apk rust") echo "apk add rust cargo" ;;
	*) echo "the package manager of this system: $1" ;;
	esac
}

# How this user runs a command as root.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		echo "type: $1"
	elif command -v sudo >/dev/null; then
		echo "type: sudo $1"
	else
		echo "type as root: $1"
	fi
}

# How to get it, for the message of an error.
advice() {
	local advised
	advised=$(as_root "$(command_for "$1")")
	[ "$1" != rust ] || advised="$advised, or install rustup from https://rustup.rs"
	[ "$1" != python ] || advised="$advised, or name another interpreter: PYTHON=python3.12 make run"
	echo "$advised"
}

# Debian packages, where this user may install them without being asked.
install_packages() {
	command -v apt-get >/dev/null || return 1
	local root=
	if [ "$(id -u)" != 0 ]; then
		sudo -n true 2>/dev/null || return 1
		root="sudo -n"
	fi
	echo "pyvmm: installing the packages $*"
	$root apt-get -qq update >/dev/null 2>&1
	$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$@" >/dev/null 2>&1
}

has_rust() {
	local version
	version=$(rustc --version 2>/dev/null | cut -d' ' -f2) && cargo --version >/dev/null 2>&1 || return 1
	[ "$(printf '%s\n%s\n' $rust "$version" | sort -V | head -n 1)" = $rust ]
}

check_kvm() {
	[ -e /dev/kvm ] || fail "there is no /dev/kvm: enable virtualization in the firmware (for a guest: nested virtualization; for a container: --device /dev/kvm), then $(as_root "modprobe -a kvm_intel kvm_amd")"
	[ -r /dev/kvm ] && [ -w /dev/kvm ] || fail "no permission on /dev/kvm: $(as_root "usermod -aG kvm $(id -un)"), and log in again"
}

[ "$(uname -sm)" = "Linux x86_64" ] || fail "pyvmm needs Linux on x86-64, this is $(uname -sm)"
case $wanted in *" kvm "*) check_kvm ;; esac

export PATH="$HOME/.cargo/bin:$PATH"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "there is no $python: $(advice python)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	fail "Python 3.11 or newer is needed, this is $("$python" --version 2>&1): $(advice python)"
command -v cc >/dev/null || install_packages gcc libc6-dev || fail "a C linker is needed: $(advice cc)"
has_rust || install_packages rustc-web cargo-web || true
has_rust || fail "Rust $rust or newer is needed: $(advice rust)"

# PYTHON chooses the interpreter also after .venv was made with another one.
if [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
	base='import sys; print(sys.base_prefix, *sys.version_info)'
	if [ "$("$python" -c "$base")" != "$(.venv/bin/python -c "$base" 2>/dev/null)" ]; then
		echo "pyvmm: making .venv anew with $("$python" --version), which PYTHON names; it was of $(.venv/bin/python --version 2>&1 | tail -n 1)"
		rm -rf .venv
	fi
fi

if [ ! -x .venv/bin/pip ]; then
	"$python" -m venv .venv >/dev/null 2>&1 || { install_packages python3-venv && "$python" -m venv --clear .venv; } ||
		fail "Python's venv is needed: $(advice python)"
fi

pip() {
	.venv/bin/python -m pip --disable-pip-version-check -q "$@"
}

# What pyproject.toml names: what pyvmm needs and what builds it; for the tests, everything.
requirements() {
	"$python" - "$1" <<-'END'
		import sys
		import tomllib
		project = tomllib.load(open("pyproject.toml", "rb"))
		needed = project["project"]["dependencies"] + project["build-system"]["requires"]
		extras = project["project"]["optional-dependencies"]
		print("\n".join(needed + (extras["dev"] + extras["docs"] if sys.argv[1] == "all" else [])))
	END
}

has_packages() {
	[ -e ".venv/packages-$1" ] && [ ! pyproject.toml -nt ".venv/packages-$1" ]
}

case $wanted in *" run "*) packages=run ;; *) packages=all ;; esac
if ! has_packages $packages && ! has_packages all; then
	echo "pyvmm: installing Python packages into .venv"
	requirements $packages | pip install -r /dev/stdin || fail "pip could not install the Python packages named above"
	touch ".venv/packages-$packages"
fi

if [ ! -e .venv/built ] || [ -n "$(find src Cargo.toml Cargo.lock pyproject.toml -newer .venv/built | head -n 1)" ]; then
	echo "pyvmm: building the native module"
	VIRTUAL_ENV="$PWD/.venv" .venv/bin/maturin develop --release >.venv/build.log 2>&1 || {
		cat .venv/build.log >&2
		fail "the native module could not be built, for the reason above"
	}
	touch .venv/built
fi
