//! `Exit`, the result of `run()`, with its reason, and `Outcome`, what a vCPU does next. Pure data.

use std::fmt;

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest executed HLT with no in-kernel interrupt controller to wake it.
    Halt,
    /// The guest requested a reset, by any of a PC's ways or KVM's system event.
    Reset,
    /// The guest shut down by a triple fault.
    Shutdown,
    /// The guest wrote to the exit port; the code is the value.
    Code,
    /// The host stopped the run.
    Stopped,
    /// The timeout of `run` passed.
    Timeout,
    /// `KVM_EXIT_DEBUG`: a breakpoint or a single step that no hook has handled.
    Debug,
    /// `KVM_EXIT_INTERNAL_ERROR`: KVM could not continue, often because of an instruction that it
    /// cannot emulate.
    InternalError,
    /// `KVM_EXIT_FAIL_ENTRY`: the processor refused the vCPU's state.
    FailEntry,
    /// An exit that pyvmm does not handle; the code is KVM's number.
    UnknownExit,
    /// The vCPU itself failed: `KVM_RUN` returned an error.
    VcpuError,
    /// An ELF program has raised an exception.
    Exception,
    /// The guest switched the machine off, by ACPI or KVM's system event.
    Poweroff,
    /// The guest reported a panic, by the pvpanic port.
    Panic,
    /// All vCPUs halted with interrupts off, on a machine with an in-kernel interrupt controller.
    /// Only an NMI of the host can wake one.
    AllHalted,
}

impl ExitReason {
    /// The name of the reason in Python's `ExitReason`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Halt => "halt",
            Self::Reset => "reset",
            Self::Shutdown => "shutdown",
            Self::Code => "code",
            Self::Stopped => "stopped",
            Self::Timeout => "timeout",
            Self::Debug => "debug",
            Self::InternalError => "internal-error",
            Self::FailEntry => "fail-entry",
            Self::UnknownExit => "unknown-exit",
            Self::VcpuError => "vcpu-error",
            Self::Exception => "exception",
            Self::Poweroff => "poweroff",
            Self::Panic => "panic",
            Self::AllHalted => "all-halted",
        }
    }

    /// Whether another `run` can continue the guest, because the host ended this run, or because an
    /// NMI of the host can still wake it.
    #[must_use]
    pub fn resumable(self) -> bool {
        matches!(self, Self::Stopped | Self::Timeout | Self::Debug | Self::AllHalted)
    }
}

/// How a run ended: the reason, the guest's code, the vCPU, and for a fault its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Why the run ended.
    pub reason: ExitReason,
    /// The guest's exit code, or the number of an unknown exit or a failed entry.
    pub code: Option<u64>,
    /// The vCPU that ended. None if the host ended the run.
    pub vcpu: Option<u64>,
    /// For a fault: KVM's report, the instruction bytes and the registers, as text.
    pub fault: Option<String>,
    /// The exception that an ELF program has raised.
    pub exception: Option<Exception>,
}

/// An exception, as the processor says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its number.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u64>,
    /// For a page fault, the address that could not be reached.
    pub cr2: Option<u64>,
    /// The instruction that failed, or after a trap the next one.
    pub rip: u64,
    /// The function or label that it is in.
    pub symbol: Option<String>,
}

/// The next step of a vCPU after an exit. A device, a hook or the exit itself decides it, and the
/// vCPU's thread carries it out.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Enter the guest again, unless the vCPU has been kicked.
    Continue,
    /// As `Continue`, once the device has room for more
    /// ([`crate::devices::Device::wait_for_room`]).
    Wait,
    /// The run ends, and the guest could continue. The device or hook has stored the reason with
    /// its owner.
    Stop,
    /// The guest has ended. In a box, because each exit passes an outcome through many hands.
    End(Box<Exit>),
}

impl Exit {
    /// An exit with only a reason.
    #[must_use]
    pub fn new(reason: ExitReason) -> Self {
        Self { reason, code: None, vcpu: None, fault: None, exception: None }
    }

    /// An exit with a code.
    #[must_use]
    pub fn with_code(reason: ExitReason, code: u64) -> Self {
        Self { code: Some(code), ..Self::new(reason) }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.name())?;
        if let Some(code) = self.code {
            write!(f, " {code}")?;
        }
        if let Some(vcpu) = self.vcpu {
            write!(f, " (vCPU {vcpu})")?;
        }
        match &self.fault {
            Some(fault) => write!(f, "\n{fault}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_reads_as_a_line() {
        let exit = Exit { vcpu: Some(1), ..Exit::with_code(ExitReason::Code, 42) };
        assert_eq!(exit.to_string(), "code 42 (vCPU 1)");
    }
}
