//! Loads a kernel other than Linux, by the first protocol that it supports: PVH, multiboot 1, or
//! its ELF entry. Nothing is written before everything has been checked.

use super::area::Area;
use super::files::Files;
use super::kernel_file::{Found, find};
use super::memory_map::memory_map;
use super::modules::{self, Placed};
use super::{pvh, zero_page};
use crate::config::{KernelBoot, KernelProtocol};
use crate::cpu::{CpuMode, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

const AT: &str = "boot.kernel";

/// The BIOS data area, and where it has the segment of the EBDA and the KiB of conventional memory.
const BIOS_DATA: (u64, u64) = (0x400, 0x500);
const EBDA_SEGMENT: u64 = 0x40e;
const CONVENTIONAL_KIB: u64 = 0x413;

/// Load the kernel and its modules; returns how it starts. `rsdp` is ACPI's root pointer.
pub(super) fn load(
    config: &KernelBoot,
    memory: &GuestMemory,
    files: &Files<'_>,
    rsdp: Option<u64>,
) -> Result<Start> {
    let image = files.read(&config.kernel, AT, files.most)?;
    let modules = modules::read(&config.modules, files)?;
    boot(&image, config.protocol, &config.cmdline, modules, memory, rsdp)
}

/// Load a kernel from its bytes.
pub(super) fn boot(
    image: &[u8],
    protocol: KernelProtocol,
    cmdline: &str,
    mut modules: Vec<Placed>,
    memory: &GuestMemory,
    rsdp: Option<u64>,
) -> Result<Start> {
    let found = find(image, protocol)?;
    let loaded = found.check(image, memory)?;
    modules::place(&mut modules, loaded.end(), memory)?;
    let mut area = Area::default();
    let map = memory_map(memory.size(), rsdp.is_some());
    let start = match found {
        Found::Pvh(..) => pvh::add(&mut area, loaded.entry(), cmdline, &modules, &map, rsdp)?,
        Found::Multiboot(header) => {
            header.add_info(&mut area, loaded.entry(), cmdline, &modules, &map)?
        }
        Found::Elf(executable) => {
            let mode = if executable.is_64 { CpuMode::Kernel64 } else { CpuMode::Kernel32 };
            let disk = ram_disk(&modules)?;
            zero_page::write(memory, zero_page::elf_header(), cmdline, disk, rsdp)?;
            zero_page::start(mode, loaded.entry())
        }
    };
    if !loaded.hits(BIOS_DATA) {
        write_bios_data(memory)?;
    }
    area.write(memory)?;
    loaded.write(memory)?;
    modules::write(&modules, memory)?;
    Ok(start)
}

/// Linux's boot parameters, which a kernel at its ELF entry finds, have one RAM disk.
fn ram_disk(modules: &[Placed]) -> Result<(u32, u32)> {
    match modules {
        [] => Ok((0, 0)),
        [one] if one.cmdline.is_empty() => {
            let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
            Ok((number(one.start), number(one.bytes.len() as u64)))
        }
        _ => {
            let detail = "a kernel at its ELF entry has one module at most, without a command line";
            Err(Error::new(ErrorKind::Config, "boot.modules", detail)
                .hint("multiboot and PVH have lists of modules"))
        }
    }
}

/// Where kernels look for the MP table and the size of conventional memory.
fn write_bios_data(memory: &GuestMemory) -> Result<()> {
    let (segment, kib) = (layout::EBDA_START >> 4, layout::EBDA_START >> 10);
    for (at, value) in [(EBDA_SEGMENT, segment), (CONVENTIONAL_KIB, kib)] {
        memory.write(at, value.to_le_bytes().get(..2).unwrap_or(&[]))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Covers src/boot/kernel_file.rs.

    use super::super::modules::tests::module;
    use super::super::multiboot::tests::header;
    use super::super::notes::tests::note;
    use super::super::program_headers::tests::{elf, elf32};
    use super::*;
    use proptest::prelude::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(4 << 20).unwrap()
    }

    fn start(image: &[u8], protocol: KernelProtocol, modules: Vec<Placed>) -> Result<Start> {
        boot(image, protocol, "quiet", modules, &memory(), None)
    }

    /// An ELF file with more headers of these types, for the bytes of its first one.
    fn with_headers(mut image: Vec<u8>, kinds: &[u8]) -> Vec<u8> {
        let first = image[64..120].to_vec();
        for kind in kinds.iter().rev() {
            image.splice(120..120, [&[*kind][..], &first[1..]].concat());
        }
        let count = u8::try_from(kinds.len()).unwrap();
        image[56] = 1 + count;
        (0..=kinds.len()).for_each(|n| image[72 + 56 * n] = 0x78 + 56 * count);
        image
    }

    /// An ELF file whose first segment is also its notes.
    fn with_note(image: Vec<u8>) -> Vec<u8> {
        with_headers(image, &[4])
    }

    #[test]
    fn the_first_protocol_that_a_file_supports_is_taken() {
        let pvh = note(b"Xen\0", 18, &0x10_0004u32.to_le_bytes());
        let both = with_note(elf(0x10_0000, &[&pvh[..], &header(0, &[])].concat()));
        let (auto, elf_entry) = (KernelProtocol::Auto, KernelProtocol::Elf);
        let mode = |image: &[u8], protocol| {
            let start = start(image, protocol, Vec::new()).unwrap();
            (start.mode, start.entry, start.arguments.rax != 0, start.arguments.rsi != 0)
        };
        assert_eq!(mode(&both, auto), (CpuMode::Loader32, 0x10_0004, false, false));
        let loader = (CpuMode::Loader32, 0x10_0000, true, false);
        assert_eq!(mode(&both, KernelProtocol::Multiboot), loader);
        assert_eq!(mode(&both, elf_entry), (CpuMode::Kernel64, 0x10_0000, false, true));
        for image in [elf(0x10_0000, &header(0, &[])), elf32(0x10_0000, &header(0, &[]))] {
            assert_eq!(mode(&image, auto), loader);
        }
        assert_eq!(mode(&elf(0x10_0000, b"code"), auto).0, CpuMode::Kernel64);
        assert_eq!(mode(&elf32(0x10_0000, b"code"), auto).0, CpuMode::Kernel32);
        let flat = header(1 << 16, &[0x10_0000, 0x10_0000, 0, 0, 0x10_0010]);
        assert_eq!(mode(&flat, auto), (CpuMode::Loader32, 0x10_0010, true, false));
        for protocol in [KernelProtocol::Pvh, elf_entry] {
            let error = start(&flat, protocol, Vec::new()).err().unwrap();
            assert_eq!(error.at, "boot.protocol", "{error}");
        }
    }

    #[test]
    fn what_is_no_such_kernel_is_refused_and_nothing_is_written() {
        let code = elf(0x10_0000, b"code");
        let sum = 0u32.wrapping_sub(0xe852_50d6);
        let second: Vec<u8> =
            [0xe852_50d6, 0, 0, sum].into_iter().flat_map(u32::to_le_bytes).collect();
        let program = with_note(elf(0x10_0000, &note(b"GNU\0", 1, &[0; 16])));
        let outside = with_note(elf(0x10_0000, &note(b"Xen\0", 18, &[0; 4])));
        let mut x32 = elf32(0x10_0000, b"code");
        x32[18] = 62;
        let two = || vec![module(b"a", ""), module(b"b", "")];
        let large = || vec![module(&[1; 4 << 20], "")];
        let (auto, none) = (KernelProtocol::Auto, Vec::new);
        for (image, protocol, modules, at, reason) in [
            (&code[..], KernelProtocol::Pvh, none(), "boot.protocol", "PVH note"),
            (&code, KernelProtocol::Multiboot, none(), "boot.protocol", "multiboot 1 header"),
            (&elf(0x10_0000, &second), auto, none(), AT, "multiboot 2"),
            (&x32, auto, none(), AT, "x32"),
            (&program, auto, none(), AT, "a program for an operating system"),
            (&outside, auto, none(), AT, "PVH entry"),
            (&header(0, &[]), auto, none(), AT, "no addresses"),
            (&elf(0x10_0000, &header(8, &[])), auto, none(), AT, "flag bits 3"),
            (b"#!/bin/sh", auto, none(), AT, "a script"),
            (&code, auto, two(), "boot.modules", "one module at most"),
            (&code, auto, large(), "boot.modules[0]", "do not fit"),
        ] {
            let memory = memory();
            memory.log_dirty(true).unwrap();
            let error = boot(image, protocol, "", modules, &memory, None).unwrap_err();
            assert!(error.at == at && error.detail.contains(reason), "{error}");
            assert_eq!(memory.take_dirty().unwrap()[0].ranges(), [], "{error}");
        }
        start(&elf(0x10_0000, &second), KernelProtocol::Elf, Vec::new()).unwrap();
    }

    #[test]
    fn an_interpreter_is_ignored_if_a_boot_protocol_says_how_to_start() {
        let pvh = note(b"Xen\0", 18, &0x10_0004u32.to_le_bytes());
        let entry =
            |image: &[u8]| start(image, KernelProtocol::Auto, Vec::new()).map(|start| start.entry);
        assert_eq!(entry(&with_headers(elf(0x10_0000, &pvh), &[4, 3])).unwrap(), 0x10_0004);
        let error = entry(&with_headers(elf(0x10_0000, b"code"), &[3])).unwrap_err();
        assert!(error.detail.contains("dynamically linked"), "{error}");
    }

    #[test]
    fn the_bios_data_area_is_written_unless_the_kernel_is_there() {
        for (address, kib) in [(0x8000, 639u16), (0x500, 639), (0x3ff, 0)] {
            let memory = memory();
            let image = elf(address, b"code");
            boot(&image, KernelProtocol::Auto, "", Vec::new(), &memory, None).unwrap();
            assert_eq!(
                memory.load::<u16>(CONVENTIONAL_KIB & !1).unwrap() >> 8,
                kib & 0xff,
                "{kib}"
            );
        }
    }

    #[test]
    fn a_ram_disk_is_in_the_boot_parameters() {
        let memory = memory();
        let (auto, image) = (KernelProtocol::Auto, elf(0x10_0000, b"code"));
        boot(&image, auto, "", vec![module(b"disk", "")], &memory, None).unwrap();
        let at = |offset| memory.load::<u32>(layout::ZERO_PAGE + offset).unwrap();
        assert_eq!((at(0x218), at(0x21c)), (0x10_1000, 4));
        assert_eq!(memory.load::<u32>(0x10_1000).unwrap(), u32::from_le_bytes(*b"disk"));
    }

    proptest! {
        #[test]
        fn a_mutated_kernel_never_panics_and_is_loaded_whole_or_not_at_all(
            which in 0usize..4,
            protocol in 0usize..4,
            cut in any::<Option<u16>>(),
            changes in prop::collection::vec((0usize..0xd0, any::<u8>()), 0..8),
        ) {
            let pvh = note(b"Xen\0", 18, &0x10_0004u32.to_le_bytes());
            let mut image = match which {
                0 => with_note(elf(0x10_0000, &pvh)),
                1 => elf32(0x10_0000, &header(7, &[])),
                2 => header(1 << 16, &[0x10_0000, 0x10_0000, 0, 0, 0x10_0010]),
                _ => elf(0x10_0000, &header(0, &[])),
            };
            for (at, value) in changes {
                if let Some(byte) = image.get_mut(at) {
                    *byte = value;
                }
            }
            image.truncate(cut.map_or(usize::MAX, usize::from));
            let protocol = [
                KernelProtocol::Auto,
                KernelProtocol::Pvh,
                KernelProtocol::Multiboot,
                KernelProtocol::Elf,
            ][protocol];
            let memory = memory();
            memory.log_dirty(true).unwrap();
            if boot(&image, protocol, "a", vec![module(b"b", "c")], &memory, None).is_err() {
                prop_assert_eq!(memory.take_dirty().unwrap()[0].ranges(), []);
            }
        }
    }
}
