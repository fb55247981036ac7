//! The configuration of a machine's vCPUs as plain structs, and its validation.

use super::template::{CpuTemplate, check_names};
use super::topology::Topology;
use crate::error::{Error, ErrorKind, Result};
use crate::layout;

/// The vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuConfig {
    /// The number of vCPUs, from 1.
    pub vcpus: u64,
    /// The number of packages that they are divided into.
    pub sockets: u32,
    /// The number of threads of each core.
    pub threads: u32,
    /// Names of CPUID features to hide from the guest.
    pub hide: Vec<String>,
    /// Names of CPUID features to show to the guest, whatever the template and KVM say.
    pub expose: Vec<String>,
    /// Which other features are hidden.
    pub template: CpuTemplate,
    /// Execute instructions here that KVM's emulator refuses.
    pub fixups: bool,
}

impl Default for CpuConfig {
    fn default() -> Self {
        let template = CpuTemplate::default();
        let (hide, expose) = (Vec::new(), Vec::new());
        Self { vcpus: 1, sockets: 1, threads: 1, hide, expose, template, fixups: false }
    }
}

impl CpuConfig {
    /// # Errors
    /// [`ErrorKind::Config`] if there are too many vCPUs or they cannot be divided; if a feature is
    /// not known, or is both hidden and shown.
    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=layout::MAX_VCPUS).contains(&self.vcpus) {
            let detail = format!("{} is not from 1 to {}", self.vcpus, layout::MAX_VCPUS);
            return Err(Error::new(ErrorKind::Config, "cpu.vcpus", detail));
        }
        check_names("cpu", &self.hide, &self.expose)?;
        self.template.check()?;
        self.topology().check()
    }

    /// The vCPUs and how they are divided.
    #[must_use]
    pub fn topology(&self) -> Topology {
        let vcpus = u32::try_from(self.vcpus).unwrap_or(u32::MAX);
        Topology { vcpus, sockets: self.sockets, threads: self.threads }
    }
}

/// The processor mode in which code starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMode {
    /// 16-bit real mode.
    Real16,
    /// 32-bit protected mode, ring 0, flat segments, no paging.
    Protected32,
    /// 64-bit mode, ring 0, identity-mapped.
    Long64,
    /// 64-bit mode, ring 3, identity-mapped, with a TSS that allows every port.
    User64,
    /// 64-bit mode, ring 3, as `User64`, with only a program's own pages mapped, and exceptions
    /// that end the run.
    Program64,
    /// 64-bit mode, ring 0, identity-mapped, as a boot loader starts a kernel. In this mode and the
    /// following ones, vCPU 0 starts, and the others wait for INIT and SIPI.
    Kernel64,
    /// 32-bit protected mode, ring 0, flat segments, with FPU and SSE on.
    Kernel32,
    /// As `Kernel32`, with no bit of CR0 but PE and ET set, and none of CR4: what PVH and multiboot
    /// demand.
    Loader32,
    /// 16-bit real mode at the reset vector, below 4 GiB.
    Reset,
}

impl CpuMode {
    /// Whether only vCPU 0 starts.
    pub(crate) fn starts_one(self) -> bool {
        matches!(self, Self::Kernel64 | Self::Kernel32 | Self::Loader32 | Self::Reset)
    }

    /// Whether it is 32-bit protected mode.
    pub(crate) fn is_32_bit(self) -> bool {
        matches!(self, Self::Protected32 | Self::Kernel32 | Self::Loader32)
    }
}

/// How the vCPUs of a machine start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Their mode.
    pub mode: CpuMode,
    /// The address at which they start.
    pub entry: u64,
    /// Where their stacks end. None means at the entry.
    pub stack: Option<u64>,
    /// What a kernel finds in registers.
    pub arguments: Arguments,
}

impl Start {
    /// A start without arguments.
    #[must_use]
    pub fn new(mode: CpuMode, entry: u64) -> Self {
        Self { mode, entry, stack: None, arguments: Arguments::default() }
    }
}

/// The registers in which a boot protocol passes values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// RAX, or EAX.
    pub rax: u64,
    /// RBX, or EBX.
    pub rbx: u64,
    /// RSI, or ESI.
    pub rsi: u64,
}
