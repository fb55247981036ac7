//! Loads a kernel other than Linux, by the first protocol that it supports: PVH, multiboot 1, or
//! its ELF entry. Nothing is written before everything has been checked.

use super::area::Area;
use super::elf::ElfKernel;
use super::files::Files;
use super::identify::{self, ELF_MAGIC};
use super::memory_map::memory_map;
use super::modules::{self, Placed};
use super::multiboot::{self, Addressed, Header};
use super::notes::{self, Notes};
use super::program_headers::{Executable, Low};
use super::relocations::check_static;
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

/// How a file is booted.
#[derive(Clone, Copy)]
enum Found<'a> {
    /// With the entry that its note names.
    Pvh(Executable<'a>, u64),
    Multiboot(Header),
    Elf(Executable<'a>),
}

fn find(image: &[u8], wanted: KernelProtocol) -> Result<Found<'_>> {
    let header = multiboot::find(image);
    if !image.starts_with(ELF_MAGIC) {
        return match (wanted, header) {
            (KernelProtocol::Auto | KernelProtocol::Multiboot, Some(header)) => {
                Ok(Found::Multiboot(header))
            }
            _ => Err(identify::refused(image, AT)),
        };
    }
    let executable = Executable::new(image, AT)?;
    let notes = notes::read(executable)?;
    let has_not = |what: &str| {
        let detail = format!("the kernel has no {what}");
        Error::new(ErrorKind::Boot, "boot.protocol", detail).hint("leave the protocol out")
    };
    match (wanted, notes.pvh_entry, header) {
        (KernelProtocol::Auto | KernelProtocol::Pvh, Some(entry), _) => {
            Ok(Found::Pvh(executable, entry))
        }
        (KernelProtocol::Auto | KernelProtocol::Multiboot, _, Some(header)) => {
            Ok(Found::Multiboot(header))
        }
        (KernelProtocol::Pvh, ..) => Err(has_not("PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")),
        (KernelProtocol::Multiboot, ..) => Err(has_not("multiboot 1 header in its first 8 KiB")),
        (KernelProtocol::Auto | KernelProtocol::Elf, ..) => {
            if executable.is_x32 {
                let detail = "a 32-bit ELF file with 64-bit code (x32), which has no boot protocol";
                return Err(executable.bad(detail).hint("link it as ELF64"));
            }
            if wanted == KernelProtocol::Auto {
                check_entry_fits(executable, notes)?;
            }
            Ok(Found::Elf(executable))
        }
    }
}

/// Whether a file without a boot protocol may be a kernel that starts at its ELF entry.
fn check_entry_fits(executable: Executable<'_>, notes: Notes) -> Result<()> {
    check_static(executable)?;
    if notes.is_program {
        return Err(executable
            .bad("a program for an operating system, not a kernel")
            .hint("run it in a guest's Linux, or as ElfBoot if it makes no system call"));
    }
    if multiboot::has_version_2(executable.image) {
        return Err(executable
            .bad("it has a multiboot 2 header, and pyvmm boots multiboot 1")
            .hint("add a multiboot 1 header or a PVH note; protocol \"elf\" ignores the header"));
    }
    Ok(())
}

/// A file that has been checked.
enum Loaded<'a> {
    Elf(ElfKernel<'a>, u64),
    Addressed(Addressed<'a>),
}

impl<'a> Found<'a> {
    fn check(self, image: &'a [u8], memory: &GuestMemory) -> Result<Loaded<'a>> {
        let elf = |executable| ElfKernel::new(executable, memory, Low::BesideTables);
        match self {
            Self::Pvh(executable, entry) => {
                let kernel = elf(executable)?;
                let entry = kernel.moved(entry);
                if !kernel.has(entry) {
                    let detail = format!("its PVH entry {entry:#x} is in none of its segments");
                    return Err(executable.bad(detail));
                }
                Loaded::Elf(kernel, entry).in_32_bits()
            }
            Self::Multiboot(header) => {
                header.check()?;
                if let Some(addressed) = header.addressed(image, memory)? {
                    return Ok(Loaded::Addressed(addressed));
                }
                if !image.starts_with(ELF_MAGIC) {
                    let detail = "its multiboot header has no addresses, and it is no ELF file";
                    return Err(Error::new(ErrorKind::Boot, AT, detail));
                }
                let kernel = elf(Executable::new(image, AT)?)?;
                let entry = kernel.entry;
                Loaded::Elf(kernel, entry).in_32_bits()
            }
            Self::Elf(executable) => {
                let kernel = elf(executable)?;
                let entry = kernel.entry;
                Ok(Loaded::Elf(kernel, entry))
            }
        }
    }
}

impl Loaded<'_> {
    fn entry(&self) -> u64 {
        match self {
            Self::Elf(_, entry) => *entry,
            Self::Addressed(addressed) => addressed.entry,
        }
    }

    fn end(&self) -> u64 {
        match self {
            Self::Elf(kernel, _) => kernel.end(),
            Self::Addressed(addressed) => addressed.end,
        }
    }

    /// Whether it has one of these addresses.
    fn hits(&self, (start, end): (u64, u64)) -> bool {
        match self {
            Self::Elf(kernel, _) => kernel.segments.iter().any(|s| s.start < end && start < s.end),
            Self::Addressed(addressed) => addressed.load < end && start < addressed.end,
        }
    }

    /// A 32-bit entry reaches 4 GiB.
    fn in_32_bits(self) -> Result<Self> {
        if self.end() <= layout::MMIO_GAP_END {
            return Ok(self);
        }
        let detail = "it has segments beyond 4 GiB, and a 32-bit entry";
        Err(Error::new(ErrorKind::Boot, AT, detail))
    }

    fn write(&self, memory: &GuestMemory) -> Result<()> {
        match self {
            Self::Elf(kernel, _) => kernel.write(memory),
            Self::Addressed(addressed) => addressed.write(memory),
        }
    }
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

    /// An ELF file whose first segment is also its notes.
    fn with_note(mut image: Vec<u8>) -> Vec<u8> {
        let first = image[64..120].to_vec();
        image.splice(120..120, first);
        image[120] = 4;
        image[56] = 2;
        image[72] += 56;
        image[128] += 56;
        image
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
