//! Who runs a machine, and whether it is still open. Pure data: `life.rs` and `run.rs` change it
//! under its lock.

use std::thread::ThreadId;

use crate::error::Error;

/// Who is inside `run`.
#[derive(Debug, Default)]
pub(super) struct Runner {
    pub(super) thread: Option<ThreadId>,
    /// `start` was called, and nobody has waited to the end.
    pub(super) is_started: bool,
    /// `close` was called from inside: it happens when the run ends.
    pub(super) close_at_end: bool,
    pub(super) life: Life,
}

/// Whether the machine is still there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Life {
    #[default]
    Open,
    /// This thread closes it.
    Closing(ThreadId),
    Closed,
}

pub(crate) fn closed() -> Error {
    Error::closed("machine")
}
