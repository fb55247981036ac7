#!/usr/bin/env bash
# Builds a small Linux from Debian's linux-source package: vmlinux and bzImage for one processor, and an uncompressed
# initramfs. With "tests" as argument also vmlinux-stock, for a processor that executes every instruction, vmlinux-smp,
# for several processors and ACPI, and a bzImage of each compression. Caches the result and prints its folder as the
# last line. Takes minutes once. "where" as argument only prints the folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${PYVMM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pyvmm}
source=/usr/src/linux-source-6.1.tar.xz
packages="linux-source-6.1 gcc make flex bison bc libelf-dev libssl-dev xz-utils lz4 zstd"
what=${1:-}

kernels=("$here"/build.sh "$here"/kernel.config "$here"/smp.config)
userspace=("$here"/init.c "$here"/initramfs.list "$here"/cmdline)
kernel_key=$(cat "${kernels[@]}" | sha256sum | cut -c1-16)
key=$(cat "${kernels[@]}" "${userspace[@]}" | sha256sum | cut -c1-16)
built=$cache/kernels-$kernel_key
out=$cache/linux-$key
finished() {
    [ -e "$out/machine.toml" ] && { [ "$what" != tests ] || [ -e "$out/vmlinux-smp" ]; }
}
if [ "$what" = where ] || finished; then
    echo "$out"
    exit 0
fi

missing() {
    [ -e "$source" ] || return 0
    for tool in gcc make flex bison bc xz lz4 zstd; do
        command -v "$tool" >/dev/null || return 0
    done
    [ -e /usr/include/libelf.h ] && [ -d /usr/include/openssl ] || return 0
    return 1
}
if missing; then
    install="apt-get install -y --no-install-recommends $packages"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $packages" >&2
        { apt-get update && DEBIAN_FRONTEND=noninteractive $install; } >&2
    else
        echo "the small Linux needs Debian's packages: sudo $install" >&2
        exit 3
    fi
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/build-XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$out.log
echo "building the small Linux, once, about 6 minutes; log: $log" >&2

build_kernels() {
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
    if [ "$what" = tests ]; then
        # This one executes INT3 and FWAIT.
        make -j"$(nproc)" vmlinux
        objcopy --strip-debug vmlinux "$work"/built/vmlinux-stock
    fi
    # The emulator refuses INT3: leave out the self-test of INT3.
    edit arch/x86/kernel/alternative.c 's|^\tint3_selftest();|\t(void)int3_selftest; /* left out */|' 'left out'
    # The emulator refuses FWAIT.
    edit arch/x86/kernel/fpu/core.c 's|"1: fwait\\n"|"1: nop\\n"|' '"1: nop'
    make -j"$(nproc)" vmlinux bzImage
    objcopy --strip-debug vmlinux "$work"/built/vmlinux
    cp arch/x86/boot/bzImage .config usr/gen_init_cpio "$work"/built/
    if [ "$what" = tests ]; then
        # The bzImage above is compressed with LZ4. Only what unpacks the kernel differs, so only that is compiled again.
        for compression in GZIP ZSTD XZ LZMA; do
            scripts/config --disable KERNEL_LZ4 --disable KERNEL_GZIP --disable KERNEL_ZSTD --disable KERNEL_XZ \
                --enable KERNEL_$compression
            make -s olddefconfig
            make -j"$(nproc)" bzImage
            cp arch/x86/boot/bzImage "$work"/built/bzImage-${compression,,}
        done
        scripts/kconfig/merge_config.sh -m .config "$here"/smp.config
        make -s olddefconfig
        make -j"$(nproc)" vmlinux
        objcopy --strip-debug vmlinux "$work"/built/vmlinux-smp
    fi
}

build_initramfs() {
    cd "$work"
    gcc -m32 -O1 -static -nostdlib -ffreestanding -fno-pie -no-pie -fno-omit-frame-pointer \
        -Wall -Werror -o init "$here"/init.c
    "$built"/gen_init_cpio "$here"/initramfs.list > initramfs.cpio
    cat > machine.toml <<-END
	# A machine with this Linux, which starts a shell: pyvmm run --config machine.toml
	[boot]
	type = "linux"
	kernel = "vmlinux"
	initrd = "initramfs.cpio"
	cmdline = "$(cat "$here"/cmdline) pyvmm.shell"
	END
}

# Publishes a folder that was made beside its place. Another build may have been first.
publish() { # from, to
    chmod 755 "$1"
    mv -T "$1" "$2" 2>/dev/null || { rm -rf "$2.old"; mv -T "$2" "$2.old"; mv -T "$1" "$2"; rm -rf "$2.old"; }
}

build() {
    if [ ! -e "$built/vmlinux" ] || { [ "$what" = tests ] && [ ! -e "$built/vmlinux-smp" ]; }; then
        mkdir "$work"/built
        (build_kernels)
        publish "$work"/built "$built"
    fi
    (build_initramfs)
    mkdir "$work"/out
    ln "$built"/vmlinux* "$built"/bzImage* "$built"/.config "$work"/out
    cp "$work"/initramfs.cpio "$work"/machine.toml "$here"/cmdline "$work"/out
    publish "$work"/out "$out"
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
    echo "the small Linux did not build: see $log" >&2
    exit 1
fi
echo "$out"
