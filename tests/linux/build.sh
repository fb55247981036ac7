#!/usr/bin/env bash
# Builds the Linux the tests boot, from Debian's linux-source package: vmlinux and bzImage for one processor,
# vmlinux-stock for one whose instructions all get executed, vmlinux-smp for several, and an uncompressed initramfs.
# Caches the result outside the checkout and prints its folder as the last line. Takes minutes once.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${PYVMM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pyvmm}
source=/usr/src/linux-source-6.1.tar.xz
packages="linux-source-6.1 gcc make flex bison bc libelf-dev libssl-dev xz-utils lz4"

key=$(cat "$here"/build.sh "$here"/kernel.config "$here"/smp.config "$here"/init.c "$here"/initramfs.list | sha256sum | cut -c1-16)
out=$cache/linux-$key
if [ -e "$out/initramfs.cpio" ]; then
    echo "$out"
    exit 0
fi

missing() {
    [ -e "$source" ] || return 0
    for tool in gcc make flex bison bc xz lz4; do
        command -v "$tool" >/dev/null || return 0
    done
    [ -e /usr/include/libelf.h ] && [ -d /usr/include/openssl ] || return 0
    return 1
}
if missing; then
    install="apt-get install -y --no-install-recommends $packages"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update && DEBIAN_FRONTEND=noninteractive $install; } >&2
    else
        echo "the test Linux needs Debian's packages: sudo $install" >&2
        exit 3
    fi
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/build-XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$cache/linux-$key.log
echo "building the test Linux, once, about 6 minutes; log: $log" >&2

build() {
    tar -xf "$source" -C "$work"
    cd "$work"/linux-source-6.1

    # Four edits, for KVMs that emulate ring 0 in software. Each must match, or the build stops here.
    edit() { # file, sed expression, a string that must be gone or there afterwards
        sed -i "$2" "$1"
        grep -q "$3" "$1"
    }
    # SYSRETL loads a 64-bit CS there: always return by IRET.
    edit arch/x86/entry/common.c '/long do_fast_syscall_32/,/^}/ s|return regs->cs == __USER32_CS|return 0 \&\& regs->cs == __USER32_CS|' 'return 0 &&'
    # This self-test takes seconds when emulated.
    edit lib/crypto/blake2s.c 's|WARN_ON(!blake2s_selftest())|0 /* no self-test */|' 'no self-test'

    make -s tinyconfig
    scripts/kconfig/merge_config.sh -m .config "$here"/kernel.config
    make -s olddefconfig
    # This one executes INT3 and FWAIT.
    make -s -j"$(nproc)" vmlinux
    objcopy --strip-debug vmlinux "$work"/vmlinux-stock

    # The emulator refuses INT3: leave out the self-test of INT3.
    edit arch/x86/kernel/alternative.c 's|^\tint3_selftest();|\t(void)int3_selftest; /* left out */|' 'left out'
    # The emulator refuses FWAIT.
    edit arch/x86/kernel/fpu/core.c 's|"1: fwait\\n"|"1: nop\\n"|' '"1: nop'
    make -s -j"$(nproc)" vmlinux bzImage
    objcopy --strip-debug vmlinux "$work"/vmlinux
    cp arch/x86/boot/bzImage .config "$work"/
    scripts/kconfig/merge_config.sh -m .config "$here"/smp.config
    make -s olddefconfig
    make -s -j"$(nproc)" vmlinux
    objcopy --strip-debug vmlinux "$work"/vmlinux-smp
    cp usr/gen_init_cpio "$work"/
    cd "$work"
    gcc -m32 -O1 -static -nostdlib -ffreestanding -fno-pie -no-pie -fno-omit-frame-pointer \
        -Wall -Werror -o init "$here"/init.c
    ./gen_init_cpio "$here"/initramfs.list > initramfs.cpio
}
# Not in an `if`: there `set -e` would be ignored inside the function.
set +e
(
    set -e
    build
) >"$log" 2>&1 </dev/null
status=$?
set -e
if [ $status != 0 ]; then
    tail -n 20 "$log" >&2
    echo "the test Linux did not build: see $log" >&2
    exit 1
fi
stage=$(mktemp -d "$cache/stage-XXXXXX")
chmod 755 "$stage"
cp "$work"/vmlinux "$work"/vmlinux-stock "$work"/vmlinux-smp "$work"/bzImage "$work"/.config "$work"/initramfs.cpio "$stage"/
mv -T "$stage" "$out" 2>/dev/null || rm -rf "$stage"   # another build may have been first
echo "$out"
