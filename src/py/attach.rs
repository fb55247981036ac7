//! The one way into Python for a thread that may not hold the GIL.

use pyo3::prelude::*;

use super::ending::{guard_thread, sleep_until_the_process_ends};
use crate::sync::assert_unlocked;

/// Take the GIL and call `f`. Whoever has the GIL may wait for any lock, so this thread holds none. Where the interpreter ends
/// there is no GIL for this thread any more: then it sleeps.
pub(super) fn attach<T>(f: impl for<'py> FnOnce(Python<'py>) -> T) -> T {
    assert_unlocked("Python is entered");
    guard_thread();
    Python::try_attach(f).unwrap_or_else(|| sleep_until_the_process_ends())
}
