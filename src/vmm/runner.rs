//! Which thread runs a machine, and whether the machine is open. Pure data, which `life.rs` and
//! `run.rs` change under its lock.

use std::thread::ThreadId;

use crate::error::Error;
use crate::exit_handler::Exit;

/// The thread inside `run`.
#[derive(Debug, Default)]
pub(super) struct Runner {
    pub(super) thread: Option<ThreadId>,
    /// `start` was called, and no `wait` has seen the end.
    pub(super) is_started: bool,
    /// A watch of the console started it: `start` and `run` may continue it.
    pub(super) is_joinable: bool,
    /// The thread inside waits for output, and leaves if another wants to run the loop.
    pub(super) yields: bool,
    /// How many further runs begin on the vCPUs' own threads, because one that began on its
    /// caller's thread took too long for it.
    pub(super) runs_on_own_thread: u32,
    /// How many threads want to run the loop.
    pub(super) wanted: usize,
    /// The result of the last run; `None` after an error.
    pub(super) last: Option<Exit>,
    /// `close` was called from inside the run, and takes effect at its end.
    pub(super) close_at_end: bool,
    /// That run has ended with a callback in progress, which the close has to wait for: the caller
    /// of the run closes it.
    pub(super) is_close_due: bool,
    pub(super) life: Life,
}

/// Whether the machine is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Life {
    #[default]
    Open,
    /// This thread is closing it.
    Closing(ThreadId),
    Closed,
}

pub(crate) fn closed() -> Error {
    Error::closed("machine")
}
