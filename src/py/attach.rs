//! The one way into Python for a thread that may not hold the GIL.

use pyo3::prelude::*;

use super::ending::{guard_thread, sleep_until_the_process_ends};
use crate::sync::assert_unlocked;
use crate::vcpu;

/// Take the GIL and call `f`. Whoever has the GIL may wait for any lock, so this thread holds none.
/// Where the interpreter ends there is no GIL for this thread any more: then it sleeps.
pub(super) fn attach<T>(f: impl for<'py> FnOnce(Python<'py>) -> T) -> T {
    assert_unlocked("Python is entered");
    guard_thread();
    Python::try_attach(f).unwrap_or_else(|| sleep_until_the_process_ends())
}

unsafe extern "C" {
    /// What `threading.stack_size()` says; 0 for the default.
    fn PyThread_get_stacksize() -> usize;
}

/// Give vCPU threads that start from now on the stack that `threading` gives: callbacks run on it.
pub(super) fn adopt_stack_size(_py: Python<'_>) {
    // SAFETY: it reads a field of the interpreter, whose GIL the caller has.
    vcpu::set_stack_size(unsafe { PyThread_get_stacksize() });
}
