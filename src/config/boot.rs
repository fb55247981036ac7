//! What a machine starts, as plain structs, and its validation.

use std::path::PathBuf;

use crate::cpu::CpuMode;
use crate::error::{Error, ErrorKind, Result};
use crate::layout;

/// The code or kernel that the machine starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Boot {
    /// The built-in guest.
    #[default]
    Embedded,
    /// Code at an address.
    Flat(FlatBoot),
    /// An ELF program in 64-bit ring 3.
    Elf(ElfBoot),
    /// A Linux kernel.
    Linux(LinuxBoot),
    /// Another kernel.
    Kernel(KernelBoot),
    /// Firmware, from the reset vector.
    Firmware(FirmwareBoot),
}

/// Code at an address, started in one of four modes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatBoot {
    /// The code, or its file.
    pub code: Code,
    /// The load address.
    pub address: u64,
    /// The start address; by default `address`.
    pub entry: Option<u64>,
    /// The processor mode in which it starts.
    pub mode: CpuMode,
}

/// A static ELF program, whose exceptions end the run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElfBoot {
    /// The program's file.
    pub path: PathBuf,
    /// The size of its stack, in whole pages.
    pub stack_kib: u64,
}

/// Bytes, or a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Code {
    /// The bytes.
    Bytes(Vec<u8>),
    /// A file.
    File(PathBuf),
}

/// A Linux kernel: an ELF vmlinux or a bzImage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinuxBoot {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initial RAM disk: files, and directories that are packed, one after the other.
    pub initrd: Vec<PathBuf>,
    /// The kernel command line, at most 2,047 bytes of ASCII.
    pub cmdline: String,
    /// The load address of a bzImage; by default its preferred address.
    pub load_address: Option<u64>,
    /// How the kernel is entered.
    pub protocol: LinuxProtocol,
    /// Whether pyvmm unpacks a bzImage, instead of the kernel itself. None means where that is
    /// possible.
    pub unpack: Option<bool>,
}

/// How a Linux kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinuxProtocol {
    /// The 64-bit entry if there is one.
    #[default]
    Auto,
    /// The boot protocol's 64-bit entry.
    Bits64,
    /// The boot protocol's 32-bit entry.
    Bits32,
    /// The entry that the PVH note of a vmlinux names.
    Pvh,
}

/// A kernel other than Linux, in ring 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelBoot {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// Its command line.
    pub cmdline: String,
    /// Files that it is given.
    pub modules: Vec<Module>,
    /// How it is entered.
    pub protocol: KernelProtocol,
}

/// A file that a kernel is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// The file's own command line.
    pub cmdline: String,
}

/// How a kernel other than Linux is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelProtocol {
    /// The first of the others that the file supports.
    #[default]
    Auto,
    /// The entry that its PVH note names.
    Pvh,
    /// Multiboot 1.
    Multiboot,
    /// The entry in the ELF header.
    Elf,
}

/// Firmware.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirmwareBoot {
    /// The file of the image.
    pub path: PathBuf,
}

impl Boot {
    /// Whether it expects a PC: a kernel or firmware.
    #[must_use]
    pub fn is_pc(&self) -> bool {
        matches!(self, Self::Linux(_) | Self::Kernel(_) | Self::Firmware(_))
    }

    /// Check the values, for a machine with this much memory and so many vCPUs.
    pub(super) fn validate(&self, memory_size: u64, vcpus: u64, irqchip: bool) -> Result<()> {
        if self.is_pc() && vcpus > 1 && !irqchip {
            let detail = "the other vCPUs wait for an interrupt, which needs irqchip = true";
            return Err(bad("irqchip", detail));
        }
        match self {
            Self::Embedded | Self::Firmware(_) => Ok(()),
            Self::Flat(flat) => flat.validate(memory_size),
            Self::Elf(elf) => elf.validate(vcpus, irqchip),
            Self::Linux(linux) => linux.validate(irqchip),
            Self::Kernel(kernel) => kernel.validate(),
        }
    }
}

impl FlatBoot {
    fn validate(&self, memory_size: u64) -> Result<()> {
        let entry = self.entry.unwrap_or(self.address);
        for (at, address) in [("boot.address", self.address), ("boot.entry", entry)] {
            if !layout::in_memory(memory_size, address) {
                return Err(bad(at, format!("{address:#x} is outside guest memory")));
            }
        }
        if self.mode == CpuMode::Real16 && entry > 0xf_ffff {
            return Err(bad("boot.entry", format!("{entry:#x} is beyond real mode's first MiB")));
        }
        if self.mode == CpuMode::Protected32 && entry > 0xffff_ffff {
            return Err(bad("boot.entry", format!("{entry:#x} is beyond 32 bits")));
        }
        let modes = [CpuMode::Real16, CpuMode::Protected32, CpuMode::Long64, CpuMode::User64];
        if !modes.contains(&self.mode) {
            return Err(bad("boot.mode", "a flat guest starts in one of its four modes"));
        }
        Ok(())
    }
}

impl ElfBoot {
    fn validate(&self, vcpus: u64, irqchip: bool) -> Result<()> {
        if self.stack_kib == 0 {
            return Err(bad("boot.stack_kib", "a program needs a stack"));
        }
        if vcpus != 1 {
            let detail = format!("an ELF program runs on one vCPU, not on {vcpus}");
            return Err(bad("cpu.vcpus", detail));
        }
        if irqchip {
            let detail = "an ELF program has none: its exceptions end the run by HLT";
            return Err(bad("irqchip", detail));
        }
        Ok(())
    }
}

impl LinuxBoot {
    fn validate(&self, irqchip: bool) -> Result<()> {
        if !irqchip {
            return Err(bad("irqchip", "Linux needs an interrupt controller"));
        }
        check_length("boot.cmdline", &self.cmdline)?;
        if !self.cmdline.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
            return Err(bad("boot.cmdline", "only printable ASCII is allowed"));
        }
        if let Some(address) = self.load_address
            && !(layout::HIGH_MEMORY..layout::MMIO_GAP_START).contains(&address)
        {
            let detail = format!("{address:#x} is not between 1 MiB and 3 GiB");
            return Err(bad("boot.load_address", detail));
        }
        if self.unpack == Some(true) {
            if self.load_address.is_some() {
                let detail = "only the kernel's own decompressor moves it to a load_address";
                return Err(bad("boot.unpack", detail));
            }
            if self.protocol == LinuxProtocol::Bits32 {
                let detail = "the 32-bit entry is that of the kernel's own decompressor";
                return Err(bad("boot.unpack", detail));
            }
        }
        Ok(())
    }
}

impl KernelBoot {
    fn validate(&self) -> Result<()> {
        check_length("boot.cmdline", &self.cmdline)?;
        check_zeros("boot.cmdline", &self.cmdline)?;
        if self.modules.len() > layout::MAX_MODULES {
            let (count, most) = (self.modules.len(), layout::MAX_MODULES);
            return Err(bad("boot.modules", format!("{count} modules, at most {most} fit")));
        }
        for (n, module) in self.modules.iter().enumerate() {
            let at = format!("boot.modules[{n}].cmdline");
            check_length(&at, &module.cmdline)?;
            check_zeros(&at, &module.cmdline)?;
        }
        Ok(())
    }
}

fn check_length(at: &str, line: &str) -> Result<()> {
    if line.len() < layout::CMDLINE_SIZE {
        return Ok(());
    }
    let most = layout::CMDLINE_SIZE - 1;
    Err(bad(at, format!("{} bytes, at most {most} fit", line.len())))
}

fn check_zeros(at: &str, line: &str) -> Result<()> {
    if line.contains('\0') { Err(bad(at, "a zero byte would end it")) } else { Ok(()) }
}

pub(super) fn bad(at: &str, detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, at, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(boot: &Boot, vcpus: u64, irqchip: bool) -> String {
        boot.validate(1 << 30, vcpus, irqchip).unwrap_err().at
    }

    #[test]
    fn a_pc_with_several_vcpus_has_an_interrupt_controller() {
        let kernel = Boot::Kernel(KernelBoot::default());
        kernel.validate(1 << 20, 1, false).unwrap();
        kernel.validate(1 << 20, 2, true).unwrap();
        assert_eq!(place(&kernel, 2, false), "irqchip");
        assert_eq!(place(&Boot::Firmware(FirmwareBoot::default()), 2, false), "irqchip");
        assert_eq!(place(&Boot::Linux(LinuxBoot::default()), 1, false), "irqchip");
    }

    #[test]
    fn a_command_line_is_short_and_printable() {
        let mut linux = LinuxBoot { cmdline: "a".repeat(2048), ..LinuxBoot::default() };
        assert_eq!(linux.validate(true).unwrap_err().at, "boot.cmdline");
        linux.cmdline = "a\0b".into();
        assert_eq!(linux.validate(true).unwrap_err().at, "boot.cmdline");
        linux.cmdline = "a".repeat(2047);
        linux.validate(true).unwrap();
    }

    #[test]
    fn a_modules_line_is_named_by_its_number() {
        let module = |cmdline: &str| Module { cmdline: cmdline.into(), ..Module::default() };
        let modules = vec![module("good"), module("b\0d")];
        let boot = Boot::Kernel(KernelBoot { modules, ..KernelBoot::default() });
        assert_eq!(place(&boot, 1, true), "boot.modules[1].cmdline");
        let modules = vec![module(""); layout::MAX_MODULES + 1];
        let boot = Boot::Kernel(KernelBoot { modules, ..KernelBoot::default() });
        assert_eq!(place(&boot, 1, true), "boot.modules");
    }
}
