#!/usr/bin/env bash
# Builds a small Linux from Debian's linux-source package: vmlinux and bzImage for one processor, and an uncompressed
# initramfs. With "virtio" as argument instead vmlinux-virtio, with drivers for every virtio device, and an initramfs
# with busybox. With "tests" both, and vmlinux-stock, for a processor that executes every instruction, vmlinux-smp, for
# several processors and ACPI, and a bzImage of each compression. Caches the result and prints its folder as the last
# line. Takes minutes once. "where" as argument only prints the folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${PYVMM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pyvmm}
source=/usr/src/linux-source-6.1.tar.xz
packages="linux-source-6.1 gcc make flex bison bc libelf-dev libssl-dev xz-utils lz4 zstd"
what=${1:-small}

cd "$here"
key() {
    cat "$@" | sha256sum | cut -c1-16
}
kernels=(build.sh kernel.config smp.config)
virtio_kernel=(build.sh kernel.config virtio.config)
userspace=(init.c initramfs.list agent.c agent.list init.sh lease.sh virtio.list cmdline)
built=$cache/kernels-$(key "${kernels[@]}")
built_virtio=$cache/virtio-$(key "${virtio_kernel[@]}")
out=$cache/linux-$(key "${kernels[@]}" virtio.config "${userspace[@]}")
finished() {
    case $what in
        small) [ -e "$out/machine.toml" ] ;;
        virtio) [ -e "$out/virtio.toml" ] ;;
        *) [ -e "$out/machine.toml" ] && [ -e "$out/virtio.toml" ] && [ -e "$out/vmlinux-smp" ] ;;
    esac
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

# Goes to the source. The edits are for KVMs that emulate ring 0 in software. Each must match, or the build stops here.
edit() { # file, sed expression, a string that must be there afterwards
    sed -i "$2" "$1"
    grep -q "$3" "$1"
}
unpack_source() {
    if [ -d "$work"/linux-source-6.1 ]; then
        cd "$work"/linux-source-6.1
        return
    fi
    tar -xf "$source" -C "$work"
    cd "$work"/linux-source-6.1
    # SYSRETL loads a 64-bit CS there: always return by IRET.
    edit arch/x86/entry/common.c '/long do_fast_syscall_32/,/^}/ s|return regs->cs == __USER32_CS|return 0 \&\& regs->cs == __USER32_CS|' 'return 0 &&'
    # This self-test takes seconds when emulated.
    edit lib/crypto/blake2s.c 's|WARN_ON(!blake2s_selftest())|0 /* no self-test */|' 'no self-test'
}
# What the emulator refuses.
leave_out_instructions() {
    ! grep -q 'left out' arch/x86/kernel/alternative.c || return 0
    # INT3: the self-test of INT3.
    edit arch/x86/kernel/alternative.c 's|^\tint3_selftest();|\t(void)int3_selftest; /* left out */|' 'left out'
    # FWAIT.
    edit arch/x86/kernel/fpu/core.c 's|"1: fwait\\n"|"1: nop\\n"|' '"1: nop'
}
configure() { # fragments
    make -s tinyconfig
    scripts/kconfig/merge_config.sh -m .config "$@"
    make -s olddefconfig
}

build_kernels() {
    unpack_source
    configure "$here"/kernel.config
    if [ "$what" = tests ]; then
        # This one executes INT3 and FWAIT.
        make -j"$(nproc)" vmlinux
        objcopy --strip-debug vmlinux "$work"/built/vmlinux-stock
    fi
    leave_out_instructions
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

build_virtio_kernel() {
    unpack_source
    leave_out_instructions
    # Memory is copied and cleared by REP MOVSQ and REP STOSQ, the quickest where each step is emulated.
    edit arch/x86/kernel/alternative.c 's|^\t(void)int3_selftest;.*|&\
\tsetup_force_cpu_cap(X86_FEATURE_REP_GOOD);\
\tsetup_clear_cpu_cap(X86_FEATURE_ERMS);\
\tsetup_clear_cpu_cap(X86_FEATURE_FSRM);|' REP_GOOD
    # SYSCALL of a 64-bit program arrives at the kernel's entry still in ring 3, and faults there: make the call.
    edit arch/x86/mm/fault.c 's|^#include <asm/irq_stack.h>|&\n#include <asm/proto.h>\n#include <asm/syscall.h>|' 'asm/proto.h'
    edit arch/x86/mm/fault.c '/^DEFINE_IDTENTRY_RAW_ERRORCODE(exc_page_fault)/,/^}/ s|^\tprefetchw(&current->mm->mmap_lock);|\
\tif (user_mode(regs) \&\& address == (unsigned long)entry_SYSCALL_64) {\
\t\tregs->ip = regs->cx;\
\t\tregs->flags = regs->r11;\
\t\tregs->cs = __USER_CS;\
\t\tregs->ss = __USER_DS;\
\t\tregs->orig_ax = regs->ax;\
\t\tregs->ax = -ENOSYS;\
\t\tdo_syscall_64(regs, (int)regs->orig_ax);\
\t\treturn;\
\t}\
&|' 'regs->ip = regs->cx'
    configure "$here"/kernel.config "$here"/virtio.config
    make -j"$(nproc)" vmlinux
    objcopy --strip-debug vmlinux "$work"/built/vmlinux-virtio
    cp .config "$work"/built/.config-virtio
    cp usr/gen_init_cpio "$work"/built/
    # Fetched, not installed: it would replace the busybox of the system. Root's apt-get would fetch as a user who
    # cannot write here.
    cd "$work"
    fetch="apt-get -qq -o APT::Sandbox::User=root download busybox-static"
    $fetch || { [ "$(id -u)" = 0 ] && apt-get -qq update && $fetch; }
    dpkg-deb --fsys-tarfile busybox-static_*.deb | tar -xf - -C built --strip-components=2 ./bin/busybox
}

machine() { # kernel, RAM disk, words of the command line
    cat <<-END
	[boot]
	type = "linux"
	kernel = "$1"
	initrd = "$2"
	cmdline = "$(cat "$here"/cmdline) $3"
	END
}
build_initramfs() {
    cd "$work"
    gcc -m32 -O1 -static -nostdlib -ffreestanding -fno-pie -no-pie -fno-omit-frame-pointer \
        -Wall -Werror -o init "$here"/init.c
    "$built"/gen_init_cpio "$here"/initramfs.list > out/initramfs.cpio
    {
        echo "# A machine with this Linux, which starts a shell: pyvmm run --config machine.toml"
        machine vmlinux initramfs.cpio pyvmm.shell
    } > out/machine.toml
}

build_virtio_initramfs() {
    cd "$work"
    gcc -O2 -static -nostdlib -ffreestanding -fno-pie -no-pie -fno-stack-protector -fcf-protection=none \
        -mgeneral-regs-only -fno-asynchronous-unwind-tables -Wl,--build-id=none -Wl,-z,noseparate-code -s \
        -Wall -Wextra -Werror -o agent "$here"/agent.c
    cp "$here"/init.sh "$here"/lease.sh "$built_virtio"/busybox .
    "$built_virtio"/gen_init_cpio "$here"/virtio.list > out/virtio.cpio
    "$built_virtio"/gen_init_cpio "$here"/agent.list > out/agent.cpio
    {
        echo "# A machine with this Linux, for disks, networks and shares. It configures what it finds, and starts busybox's"
        echo "# shell: pyvmm run --config virtio.toml --disk disk.ext4 --net user --share .:host"
        machine vmlinux-virtio virtio.cpio pyvmm.setup
    } > out/virtio.toml
}

# Publishes a folder that was made beside its place. Another build may have been first.
publish() { # from, to
    chmod 755 "$1"
    mv -T "$1" "$2" 2>/dev/null || { rm -rf "$2.old"; mv -T "$2" "$2.old"; mv -T "$1" "$2"; rm -rf "$2.old"; }
}

build() {
    mkdir "$work"/out
    if [ "$what" != virtio ]; then
        if [ ! -e "$built/vmlinux" ] || { [ "$what" = tests ] && [ ! -e "$built/vmlinux-smp" ]; }; then
            mkdir "$work"/built
            (build_kernels)
            publish "$work"/built "$built"
        fi
    fi
    if [ "$what" != small ] && [ ! -e "$built_virtio/vmlinux-virtio" ]; then
        mkdir "$work"/built
        (build_virtio_kernel)
        publish "$work"/built "$built_virtio"
    fi
    # Also what an earlier build has made: the folder has all that there is.
    if [ -e "$built"/vmlinux ]; then
        (build_initramfs)
        ln "$built"/vmlinux* "$built"/bzImage* "$built"/.config "$work"/out
    fi
    if [ -e "$built_virtio"/vmlinux-virtio ]; then
        (build_virtio_initramfs)
        ln "$built_virtio"/vmlinux-virtio "$built_virtio"/.config-virtio "$work"/out
    fi
    cp "$here"/cmdline "$work"/out
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
