//! How an instruction ends: at another one, by an exception, or not executed. Pure data.

/// An exception that the instruction raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) vector: u8,
    pub(crate) code: Option<u32>,
    /// The address of a page fault, for CR2.
    pub(crate) address: Option<u64>,
}

/// Why an instruction has not been executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The instruction faults, as on the processor.
    Fault(Fault),
    /// There is no fix-up for the instruction or its operands.
    Unknown,
    /// An exception has been raised while a double fault was delivered.
    Shutdown,
}

pub(crate) type Done<T> = Result<T, Stop>;

/// A fault without an error code.
pub(crate) fn fault<T>(vector: u8) -> Done<T> {
    Err(Stop::Fault(Fault { vector, code: None, address: None }))
}

/// A fault with an error code.
pub(crate) fn fault_with<T>(vector: u8, code: u32) -> Done<T> {
    Err(Stop::Fault(Fault { vector, code: Some(code), address: None }))
}

/// Where execution continues after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// At the next instruction.
    Next,
    /// At the new RIP.
    Jumped,
    /// At the handler of an interrupt or exception, which is not single-stepped.
    Entered,
}
