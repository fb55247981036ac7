#!/bin/busybox sh
# The /init of the Linux with virtio: mounts what every program needs, does what the kernel command line asks for, and
# starts a shell on the console. "pyvmm.setup" configures the network, and mounts disks and shares below /mnt.

# A KVM that emulates ring 0 does not keep the upper halves of vector registers across a fault: the C library of busybox
# must not use them, and it decides that when a program starts.
if [ -z "$GLIBC_TUNABLES" ]; then
	export GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-ERMS
	exec /init
fi
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
export PATH=/bin HOME=/ TERM=${TERM:-linux}

setup() {
	for net in /sys/class/net/eth*; do
		[ -e "$net" ] || continue
		echo "pyvmm: network ${net##*/}"
		udhcpc -q -n -t 5 -T 1 -i "${net##*/}" -s /bin/lease >/dev/null 2>&1 || echo "pyvmm: no lease"
	done
	for disk in /sys/block/vd*; do
		[ -e "$disk" ] || continue
		name=${disk##*/}
		mkdir -p /mnt/"$name"
		mount "/dev/$name" /mnt/"$name" 2>/dev/null && echo "pyvmm: /dev/$name is mounted on /mnt/$name"
	done
	for tag in /sys/bus/virtio/drivers/9pnet_virtio/virtio*/mount_tag; do
		[ -e "$tag" ] || continue
		name=$(tr -d '\0' <"$tag")
		mkdir -p /mnt/"$name"
		mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 "$name" /mnt/"$name" &&
			echo "pyvmm: the share is mounted on /mnt/$name"
	done
}

echo "pyvmm: userspace reached, processors: $(grep -c ^processor /proc/cpuinfo)"
case " $(cat /proc/cmdline) " in
*" pyvmm.setup "*) setup ;;
esac
PS1='pyvmm> ' exec setsid cttyhack sh
