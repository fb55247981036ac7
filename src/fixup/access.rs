//! An access to memory, as page tables check it. Pure data.

/// How an instruction accesses memory, and with which permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(super) is_write: bool,
    pub(super) is_user: bool,
    /// Whether this is the processor's own access to a table or a new stack. RFLAGS.AC does not
    /// allow it to access user pages.
    pub(super) is_implicit: bool,
}

impl Access {
    /// The access of an operand, at a privilege level.
    pub(crate) fn explicit(cpl: u8, is_write: bool) -> Self {
        Self { is_write, is_user: cpl == 3, is_implicit: false }
    }

    /// The access of the frame that a delivery pushes, at the level that it enters.
    pub(crate) fn frame(level: u8) -> Self {
        Self { is_write: true, is_user: level == 3, is_implicit: false }
    }

    /// The processor's own access.
    pub(crate) fn implicit(is_write: bool) -> Self {
        Self { is_write, is_user: false, is_implicit: true }
    }
}
