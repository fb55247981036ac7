//! Says what a file is that cannot be booted, and what to do with it.

use super::fields::{u16_at, u32_at};
use crate::error::{Error, ErrorKind};

pub(super) const ELF_MAGIC: &[u8] = b"\x7fELF";

/// What pyvmm can boot, for errors.
const BOOTABLE: &str = "pyvmm boots a bzImage, a vmlinux, and for x86 an ELF executable or a kernel \
                        with a multiboot header";

const UNPACK: &str = "unpack it first";
const DISK: &str = "pyvmm boots kernels, not disks: take the kernel out of it";

/// Files with a magic number: its offset, the number, what the file is, and what to do.
const KNOWN: &[(usize, &[u8], &str, &str)] = &[
    (0, b"#!", "a script", "name the kernel that it starts"),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it first: gzip -dc FILE > kernel"),
    (0, b"\xfd7zXZ\0", "compressed by xz", "unpack it first: xz -dc FILE > kernel"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first: zstd -dc FILE > kernel"),
    (0, b"BZh", "compressed by bzip2", "unpack it first: bzip2 -dc FILE > kernel"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it first: lz4 -dc FILE > kernel"),
    (0, b"\x02\x21\x4c\x18", "compressed by lz4", "unpack it first: lz4 -dc FILE > kernel"),
    (0, b"\x5d\0\0", "compressed by lzma", "unpack it first: xz --format=lzma -dc FILE > kernel"),
    (0, b"PK\x03\x04", "a zip archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"QFI\xfb", "a qcow2 disk image", DISK),
    (0, b"KDMV", "a VMDK disk image", DISK),
    (0, b"vhdxfile", "a VHDX disk image", DISK),
    (0x8001, b"CD001", "an ISO 9660 image", DISK),
    (0x438, b"\x53\xef", "an ext file system", DISK),
    (0, b"hsqs", "a squashfs file system", DISK),
    (512, b"EFI PART", "a disk image with a GPT", DISK),
    (0, b"070701", "a cpio archive", "an initramfs is an initrd (--initrd), beside a kernel"),
    (0x38, b"ARM\x64", "a kernel for AArch64", "take one for x86"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", "take a bzImage or a vmlinux"),
    (0, b"ANDROID!", "an Android boot image", "take the kernel out of it"),
    (0, b"pyvmm", "a snapshot of pyvmm", "start it with pyvmm restore, or Snapshot.load"),
];

/// In the setup header of a bzImage.
const HEADER_MAGIC: u32 = 0x5372_6448;

const MACHINES: &[(u16, &str)] = &[
    (2, "SPARC"),
    (3, "32-bit x86"),
    (8, "MIPS"),
    (20, "PowerPC"),
    (21, "64-bit PowerPC"),
    (22, "S/390"),
    (40, "32-bit ARM"),
    (42, "SuperH"),
    (43, "64-bit SPARC"),
    (50, "Itanium"),
    (62, "x86-64"),
    (183, "AArch64"),
    (243, "RISC-V"),
    (247, "BPF"),
    (258, "LoongArch"),
];

/// The error for a file that is none of the formats that pyvmm boots.
pub(super) fn refused(image: &[u8], at: &'static str) -> Error {
    let (what, todo) = describe(image);
    Error::new(ErrorKind::Boot, at, format!("{what}; {BOOTABLE}")).hint(todo)
}

fn describe(image: &[u8]) -> (String, &'static str) {
    if image.is_empty() {
        return ("the file is empty".into(), "take another file");
    }
    if image.starts_with(ELF_MAGIC) {
        return elf(image);
    }
    if u32_at(image, 0x202) == Some(HEADER_MAGIC) {
        return ("a Linux bzImage".into(), "boot it by LinuxBoot, or --boot linux");
    }
    if is_pe(image) {
        let todo = "there is no UEFI: for Linux, take the bzImage; for others, an ELF kernel";
        return ("an EFI application or another PE file".into(), todo);
    }
    let is_at = |(at, magic, ..): &&(usize, &[u8], _, _)| {
        image.get(*at..).is_some_and(|rest| rest.starts_with(magic))
    };
    if let Some((_, _, what, todo)) = KNOWN.iter().find(is_at) {
        return ((*what).into(), todo);
    }
    if u16_at(image, 0x1fe) == Some(0xaa55) {
        let todo = "flat code is started by FlatBoot or --flat, a boot sector at 0x7c00";
        return ("a boot sector or a disk image".into(), todo);
    }
    let what = "neither an ELF file nor a bzImage, and it has no multiboot header";
    (what.into(), "flat code is started by FlatBoot or --flat, firmware by FirmwareBoot")
}

/// Whether it begins as DOS programs do and its header points at that of a PE file.
pub(super) fn is_pe(image: &[u8]) -> bool {
    let at = u32_at(image, 0x3c).and_then(|at| usize::try_from(at).ok());
    let header = at.and_then(|at| image.get(at..));
    image.starts_with(b"MZ") && header.is_some_and(|header| header.starts_with(b"PE\0\0"))
}

fn elf(image: &[u8]) -> (String, &'static str) {
    let is_big = image.get(5) == Some(&2);
    let field = |at| u16_at(image, at).map(|value| if is_big { value.swap_bytes() } else { value });
    let (Some(kind), Some(machine)) = (field(16), field(18)) else {
        return ("the ELF header is truncated".into(), "take the whole file");
    };
    let name = MACHINES.iter().find(|(number, _)| *number == machine);
    let name = name.map_or_else(|| format!("machine {machine}"), |(_, name)| (*name).into());
    if is_big {
        return (format!("a big-endian ELF file for {name}"), "take one for x86");
    }
    if !matches!(machine, 3 | 62) {
        return (format!("an ELF file for {name}, not for x86"), "take one for x86");
    }
    let (what, todo) = match kind {
        1 => ("an object file (.o)", "link it: ld -static -o kernel FILE"),
        4 => ("a core dump, not an executable", "debuggers read it"),
        _ => ("not an executable", "take the linked kernel"),
    };
    (format!("{what} for {name} (ELF type {kind})"), todo)
}

#[cfg(test)]
mod tests {
    use super::super::program_headers::tests::elf;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_file_is_named_with_what_to_do() {
        let mut object = elf(0, b"");
        object[16] = 1;
        let mut core = object.clone();
        core[16] = 4;
        let mut arm = elf(0, b"");
        arm[18] = 183;
        let mut big = elf(0, b"");
        (big[5], big[16], big[17], big[18], big[19]) = (2, 0, 2, 0, 22);
        let mut pe = vec![0; 0x84];
        pe[..2].copy_from_slice(b"MZ");
        pe[0x3c] = 0x80;
        pe[0x80..].copy_from_slice(b"PE\0\0");
        let mut iso = vec![0; 0x9000];
        iso[0x8001..0x8006].copy_from_slice(b"CD001");
        let mut sector = vec![0; 512];
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        for (image, what, todo) in [
            (&b"#!/bin/sh\n"[..], "a script", "kernel"),
            (b"\x1f\x8b\x08", "gzip", "gzip -dc"),
            (b"\xfd7zXZ\0\0", "xz", "xz -dc"),
            (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
            (b"QFI\xfb\0", "qcow2", "disks"),
            (b"", "empty", "bzImage"),
            (b"hello", "neither", "FlatBoot"),
            (&object, "an object file", "link it"),
            (&core, "core dump", "debuggers"),
            (&arm, "AArch64", "x86"),
            (&big, "big-endian ELF file for S/390", "x86"),
            (&pe, "EFI application", "UEFI"),
            (&iso, "ISO 9660", "disks"),
            (&sector, "boot sector", "--flat"),
        ] {
            let error = refused(image, "boot.kernel").to_string();
            assert!(error.contains(what) && error.contains(todo), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(image in prop::collection::vec(any::<u8>(), 0..600), which in 0usize..4) {
            let mut image = image;
            for (at, byte) in [&b""[..], ELF_MAGIC, b"MZ", b"\x7fELF\x01\x02"][which].iter().enumerate() {
                if let Some(place) = image.get_mut(at) {
                    *place = *byte;
                }
            }
            let _ = refused(&image, "boot.kernel");
        }
    }
}
