#!/usr/bin/env bash
# Fetches the guests of others that the tests run, as Debian packages them, once, outside the
# checkout: nothing is installed. Prints their folder. "where" as argument only prints it.
set -eu
packages="memtest86+ seabios u-boot-qemu"
out=${PYVMM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pyvmm}/guests
if [ "${1:-}" = where ] || [ -e "$out/complete" ]; then
	echo "$out"
	exit 0
fi
for tool in apt-get dpkg-deb; do
	command -v $tool >/dev/null || {
		echo "pyvmm: no $tool here to fetch $packages" >&2
		exit 3
	}
done
mkdir -p "$out"
work=$(mktemp -d "$out/fetch-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
# Root's apt-get would fetch as a user who cannot write here.
fetch="apt-get -qq -o APT::Sandbox::User=root download"
for package in $packages; do
	$fetch "$package" >&2 || { [ "$(id -u)" = 0 ] && apt-get -qq update >&2 && $fetch "$package" >&2; }
	dpkg-deb -x ./"$package"_*.deb .
done
mv boot/memtest86+x64.bin boot/memtest86+ia32.bin usr/share/seabios/bios-microvm.bin "$out"
mv usr/lib/u-boot/qemu-x86/u-boot.rom "$out"
touch "$out/complete"
echo "$out"
