//! The file of a kernel other than Linux: which protocol it is booted by, and whether it fits.

use super::elf::ElfKernel;
use super::identify::{self, ELF_MAGIC};
use super::multiboot::{self, Addressed, Header};
use super::notes::{self, Notes};
use super::program_headers::{Executable, Low};
use super::relocations::check_static;
use crate::config::KernelProtocol;
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

const AT: &str = "boot.kernel";

/// How a file is booted.
#[derive(Clone, Copy)]
pub(super) enum Found<'a> {
    /// With the entry that its note names.
    Pvh(Executable<'a>, u64),
    Multiboot(Header),
    Elf(Executable<'a>),
}

/// What a file is that only a multiboot header makes a kernel.
fn without_elf(image: &[u8], wanted: KernelProtocol, header: Option<Header>) -> Result<Found<'_>> {
    match (wanted, header) {
        (KernelProtocol::Auto | KernelProtocol::Multiboot, Some(header)) => {
            Ok(Found::Multiboot(header))
        }
        (_, Some(_)) => {
            let detail = "a kernel with a multiboot header, which is not an ELF file";
            Err(Error::new(ErrorKind::Boot, "boot.protocol", detail).hint("leave the protocol out"))
        }
        _ => Err(identify::refused(image, AT)),
    }
}

pub(super) fn find(image: &[u8], wanted: KernelProtocol) -> Result<Found<'_>> {
    let header = multiboot::find(image);
    if !image.starts_with(ELF_MAGIC) {
        return without_elf(image, wanted, header);
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
pub(super) enum Loaded<'a> {
    Elf(ElfKernel<'a>, u64),
    Addressed(Addressed<'a>),
}

impl<'a> Found<'a> {
    pub(super) fn check(self, image: &'a [u8], memory: &GuestMemory) -> Result<Loaded<'a>> {
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
    pub(super) fn entry(&self) -> u64 {
        match self {
            Self::Elf(_, entry) => *entry,
            Self::Addressed(addressed) => addressed.entry,
        }
    }

    pub(super) fn end(&self) -> u64 {
        match self {
            Self::Elf(kernel, _) => kernel.end(),
            Self::Addressed(addressed) => addressed.end,
        }
    }

    /// Whether it has one of these addresses.
    pub(super) fn hits(&self, (start, end): (u64, u64)) -> bool {
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

    pub(super) fn write(&self, memory: &GuestMemory) -> Result<()> {
        match self {
            Self::Elf(kernel, _) => kernel.write(memory),
            Self::Addressed(addressed) => addressed.write(memory),
        }
    }
}
