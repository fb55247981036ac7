//! KVM's exits as values. Data only; `enter.rs` makes them.

use smallvec::SmallVec;

/// The bytes of an access. Most accesses have at most eight.
pub type Data = SmallVec<[u8; 8]>;

/// Why KVM_RUN returned. The kernel's KVM documentation describes the exits in chapter 5.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// `IN` or `INS`: `count` reads of `size` bytes. The guest waits for the data.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes of one read.
        size: usize,
        /// The number of reads; more than one for `REP INS`.
        count: usize,
    },
    /// `OUT` or `OUTS`: one or more writes of `size` bytes.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes of one write.
        size: usize,
        /// The bytes of all writes.
        data: Data,
    },
    /// A read of an address without memory. The guest waits for the data.
    MmioRead {
        /// The guest-physical address.
        address: u64,
        /// Bytes.
        length: usize,
    },
    /// A write to an address without memory, or to read-only memory.
    MmioWrite {
        /// The guest-physical address.
        address: u64,
        /// The bytes written.
        data: Data,
    },
    /// `RDMSR` of a register that KVM does not know or that is filtered. The guest waits for the
    /// value.
    Rdmsr {
        /// The register's number.
        index: u32,
        /// `KVM_MSR_EXIT_REASON_*`
        reason: u32,
    },
    /// `WRMSR` to such a register.
    Wrmsr {
        /// The register's number.
        index: u32,
        /// The value.
        value: u64,
        /// `KVM_MSR_EXIT_REASON_*`
        reason: u32,
    },
    /// `HLT`, without an in-kernel interrupt controller.
    Hlt,
    /// A triple fault.
    Shutdown,
    /// A kick or an immediate exit, not caused by the guest.
    Interrupted,
    /// The guest can take an interrupt now.
    IrqWindowOpen,
    /// The processor refused to enter the guest.
    FailEntry {
        /// The processor's reason.
        reason: u64,
        /// The host's processor.
        cpu: u32,
    },
    /// KVM's internal error, for example an instruction that it cannot emulate.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`
        suberror: u32,
        /// The bytes of the instruction that it could not emulate, if it reports them.
        instruction: Vec<u8>,
        /// KVM's further data.
        data: Vec<u64>,
        /// That instruction as text.
        disassembly: Option<String>,
        /// The registers at that instruction, by name.
        registers: Vec<(&'static str, u64)>,
    },
    /// A breakpoint or a single step.
    Debug {
        /// The exception's number: 1 or 3.
        exception: u32,
        /// The linear address of the instruction.
        pc: u64,
        /// DR6
        dr6: u64,
        /// DR7
        dr7: u64,
    },
    /// The guest requests a reset or power-off through KVM's platform interface.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`
        kind: u32,
        /// KVM's further data.
        data: Vec<u64>,
    },
    /// An access that the attributes of the memory forbid.
    MemoryFault {
        /// `KVM_MEMORY_EXIT_FLAG_*`
        flags: u64,
        /// The guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// An exit of another kind.
    Unknown {
        /// `KVM_EXIT_*`
        number: u32,
    },
}

/// Kinds of exits, by which hooks and counters select them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExitKind {
    /// Port I/O.
    Io,
    /// Memory-mapped I/O.
    Mmio,
    /// Model-specific registers.
    Msr,
    /// `HLT`
    Hlt,
    /// A triple fault.
    Shutdown,
    /// A breakpoint or a single step.
    Debug,
    /// KVM's internal error, for example an instruction that it cannot emulate.
    InternalError,
    /// A reset or power-off that the guest requests through KVM's platform interface.
    SystemEvent,
    /// The processor refused the guest.
    FailEntry,
    /// An access that the attributes of the memory forbid.
    MemoryFault,
    /// An exit of another kind.
    Unknown,
}

impl ExitKind {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::Io,
        Self::Mmio,
        Self::Msr,
        Self::Hlt,
        Self::Shutdown,
        Self::Debug,
        Self::InternalError,
        Self::SystemEvent,
        Self::FailEntry,
        Self::MemoryFault,
        Self::Unknown,
    ];

    pub(super) fn bit(self) -> u64 {
        1 << self as u8
    }

    /// The kind's name, as Python's `ExitKind` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::Mmio => "mmio",
            Self::Msr => "msr",
            Self::Hlt => "hlt",
            Self::Shutdown => "shutdown",
            Self::Debug => "debug",
            Self::InternalError => "internal-error",
            Self::SystemEvent => "system-event",
            Self::FailEntry => "fail-entry",
            Self::MemoryFault => "memory-fault",
            Self::Unknown => "unknown",
        }
    }
}

impl VcpuExit {
    /// The kind by which hooks and counters select it; `None` for exits that the guest did not
    /// cause.
    #[must_use]
    pub fn kind(&self) -> Option<ExitKind> {
        Some(match self {
            Self::IoIn { .. } | Self::IoOut { .. } => ExitKind::Io,
            Self::MmioRead { .. } | Self::MmioWrite { .. } => ExitKind::Mmio,
            Self::Rdmsr { .. } | Self::Wrmsr { .. } => ExitKind::Msr,
            Self::Hlt => ExitKind::Hlt,
            Self::Shutdown => ExitKind::Shutdown,
            Self::Debug { .. } => ExitKind::Debug,
            Self::InternalError { .. } => ExitKind::InternalError,
            Self::SystemEvent { .. } => ExitKind::SystemEvent,
            Self::FailEntry { .. } => ExitKind::FailEntry,
            Self::MemoryFault { .. } => ExitKind::MemoryFault,
            Self::Unknown { .. } => ExitKind::Unknown,
            Self::Interrupted | Self::IrqWindowOpen => return None,
        })
    }

    /// The port, address or register of an access, and whether it is a write.
    #[must_use]
    pub fn place(&self) -> Option<(u64, bool)> {
        match self {
            Self::IoIn { port, .. } => Some((u64::from(*port), false)),
            Self::IoOut { port, .. } => Some((u64::from(*port), true)),
            Self::MmioRead { address, .. } => Some((*address, false)),
            Self::MmioWrite { address, .. } => Some((*address, true)),
            Self::Rdmsr { index, .. } => Some((u64::from(*index), false)),
            Self::Wrmsr { index, .. } => Some((u64::from(*index), true)),
            Self::MemoryFault { address, .. } => Some((*address, false)),
            _ => None,
        }
    }

    /// Whether the guest waits for the data of a read.
    pub(super) fn is_read(&self) -> bool {
        matches!(self, Self::IoIn { .. } | Self::MmioRead { .. } | Self::Rdmsr { .. })
    }

    /// Whether KVM completes the instruction at the next entry.
    pub(crate) fn is_access(&self) -> bool {
        self.is_write() || self.is_read()
    }

    /// Whether it is a write, to a device or to a register that the host emulates.
    #[must_use]
    pub fn is_write(&self) -> bool {
        matches!(self, Self::IoOut { .. } | Self::MmioWrite { .. } | Self::Wrmsr { .. })
    }

    /// How many bytes a read waits for.
    #[must_use]
    pub fn wanted(&self) -> Option<usize> {
        match self {
            Self::IoIn { size, count, .. } => Some(size.saturating_mul(*count)),
            Self::MmioRead { length, .. } => Some(*length),
            Self::Rdmsr { .. } => Some(8),
            _ => None,
        }
    }
}
