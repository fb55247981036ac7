//! An access to memory, as page tables judge it. Pure data.

/// How an instruction accesses memory, and with whose rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(super) is_write: bool,
    pub(super) is_user: bool,
    /// The processor's own access to a table or a new stack: RFLAGS.AC does not open user pages for
    /// it.
    pub(super) is_implicit: bool,
}

impl Access {
    /// An operand's, at a privilege level.
    pub(crate) fn explicit(cpl: u8, is_write: bool) -> Self {
        Self { is_write, is_user: cpl == 3, is_implicit: false }
    }

    /// The words that a delivery pushes, as the level that it enters would.
    pub(crate) fn frame(level: u8) -> Self {
        Self { is_write: true, is_user: level == 3, is_implicit: false }
    }

    /// The processor's own.
    pub(crate) fn implicit(is_write: bool) -> Self {
        Self { is_write, is_user: false, is_implicit: true }
    }
}
