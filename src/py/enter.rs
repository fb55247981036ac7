//! The ways into Python: from a thread that may not hold the GIL, from a vCPU's thread, and in the
//! middle of native work. The caller decides what is called and handles the result.

use pyo3::prelude::*;

use super::depth;
use super::ending::{guard_thread, import, sleep_until_the_process_ends};
use super::thread_state;
use crate::hop::hop;
use crate::process::ProcessTag;
use crate::sync::assert_unlocked;
use crate::vcpu;

/// Take the GIL and call `f`. A thread that has the GIL may wait for any lock, so this thread must
/// hold none. If the interpreter is finalizing, this thread can no longer get the GIL and sleeps.
pub(super) fn attach<T>(f: impl for<'py> FnOnce(Python<'py>) -> T) -> T {
    try_attach(f).unwrap_or_else(|| sleep_until_the_process_ends())
}

/// [`attach`], for what is left out if the interpreter is finalizing.
pub(super) fn try_attach<T>(f: impl for<'py> FnOnce(Python<'py>) -> T) -> Option<T> {
    assert_unlocked("Python is entered");
    guard_thread();
    thread_state::prepare();
    Python::try_attach(f)
}

/// Call Python on a vCPU's thread. `otherwise` handles an exception.
pub(super) fn on_vcpu_thread<T>(
    call: impl FnOnce(Python<'_>) -> PyResult<T>,
    otherwise: impl FnOnce(Python<'_>, PyErr) -> T,
) -> T {
    hop!();
    attach(|py| call_out(py, call).unwrap_or_else(|error| otherwise(py, error)))
}

/// Call the program in the middle of native work. If the call forks, the child exits when it
/// returns, because the work and its locks belong to the parent.
///
/// # Errors
/// What the call raises; as for [`depth::check`].
pub(super) fn call_out<T>(
    py: Python<'_>,
    call: impl FnOnce(Python<'_>) -> PyResult<T>,
) -> PyResult<T> {
    let process = ProcessTag::current();
    let result = depth::check().and_then(|()| call(py));
    if process.is_forked_child() {
        leave_fork(py, result.err());
    }
    result
}

/// End a process that a callback has forked. It contains only this thread, and the machine belongs
/// to the parent.
fn leave_fork(py: Python<'_>, error: Option<PyErr>) -> ! {
    let callbacks = import(py, "pyvmm.callbacks");
    let left = callbacks.and_then(|callbacks| callbacks.call_method1("leave_fork", (error,)));
    // `leave_fork` does not return.
    std::process::exit(i32::from(left.is_err()))
}

unsafe extern "C" {
    /// The value of `threading.stack_size()`; 0 for the default.
    fn PyThread_get_stacksize() -> usize;
}

/// Make new vCPU threads like those of `threading`, because callbacks run there.
/// They get the same stack size.
pub(super) fn prepare_vcpu_threads(_py: Python<'_>) {
    // SAFETY: it reads a field of the interpreter, and the caller holds the GIL.
    vcpu::set_stack_size(unsafe { PyThread_get_stacksize() });
}
