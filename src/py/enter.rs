//! The ways into Python: from a thread that may not hold the GIL, from a vCPU's thread, and in the
//! middle of native work. What is called, and what it returns, is the caller's business.

use pyo3::ffi;
use pyo3::prelude::*;

use super::ending::{guard_thread, import, sleep_until_the_process_ends};
use crate::hop::hop;
use crate::process::ProcessTag;
use crate::sync::assert_unlocked;
use crate::vcpu;

/// Take the GIL and call `f`. A thread that has the GIL may wait for any lock, so this thread holds
/// none. If the interpreter is finalizing, this thread cannot get the GIL any more and sleeps.
pub(super) fn attach<T>(f: impl for<'py> FnOnce(Python<'py>) -> T) -> T {
    assert_unlocked("Python is entered");
    guard_thread();
    Python::try_attach(f).unwrap_or_else(|| sleep_until_the_process_ends())
}

/// A vCPU thread's Python thread state, kept from one callback to the next: making one takes
/// microseconds.
struct KeptState(ffi::PyGILState_STATE, *mut ffi::PyThreadState);

impl KeptState {
    fn new() -> Self {
        guard_thread();
        // SAFETY: the interpreter is there: this is a callback of one of its objects. If it ends
        // meanwhile the thread sleeps in here. The GIL is let go again by the same thread.
        unsafe {
            let state = ffi::PyGILState_Ensure();
            Self(state, ffi::PyEval_SaveThread())
        }
    }
}

impl Drop for KeptState {
    fn drop(&mut self) {
        // SAFETY: on the thread that made it, as it ends; whoever waits for that has let the GIL
        // go.
        unsafe {
            ffi::PyEval_RestoreThread(self.1);
            ffi::PyGILState_Release(self.0);
        }
    }
}

thread_local! {
    static KEPT: KeptState = KeptState::new();
}

/// Call Python on a vCPU's thread; `otherwise` says what its exception comes to.
pub(super) fn on_vcpu_thread<T>(
    call: impl FnOnce(Python<'_>) -> PyResult<T>,
    otherwise: impl FnOnce(Python<'_>, PyErr) -> T,
) -> T {
    hop!();
    KEPT.with(|_kept| attach(|py| call_out(py, call).unwrap_or_else(|error| otherwise(py, error))))
}

/// Make a call of the program's in the midst of native work. A child that it has forked ends where
/// it returns: the work, and what it has locked, is the parent's.
pub(super) fn call_out<T>(
    py: Python<'_>,
    call: impl FnOnce(Python<'_>) -> PyResult<T>,
) -> PyResult<T> {
    let process = ProcessTag::current();
    let result = call(py);
    if process.is_forked_child() {
        leave_fork(py, result.err());
    }
    result
}

/// End the process that a callback has forked and returned in: it has this thread alone, and the
/// machine is its parent's.
fn leave_fork(py: Python<'_>, error: Option<PyErr>) -> ! {
    let callbacks = import(py, "pyvmm.callbacks");
    let left = callbacks.and_then(|callbacks| callbacks.call_method1("leave_fork", (error,)));
    // It does not return.
    std::process::exit(i32::from(left.is_err()))
}

unsafe extern "C" {
    /// What `threading.stack_size()` says; 0 for the default.
    fn PyThread_get_stacksize() -> usize;
}

/// Make vCPU threads that start from now on like those of `threading`, because callbacks run there.
///
/// They have the stack that it gives.
pub(super) fn prepare_vcpu_threads(_py: Python<'_>) {
    // SAFETY: it reads a field of the interpreter, whose GIL the caller has.
    vcpu::set_stack_size(unsafe { PyThread_get_stacksize() });
}
