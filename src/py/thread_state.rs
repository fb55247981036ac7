//! The Python thread state of a native thread. It is created without the GIL, but never while
//! another thread forks: in Python 3.11, a child hangs if a thread of its parent held the lock of
//! the list of thread states at the fork. A thread without the GIL may hold that lock only here.

use std::cell::RefCell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict, PyTuple};

use super::ending::{guard_thread, import, is_ending};

/// Held while a thread state is created, and by a thread that forks, from before the fork until
/// after it. A lock of std, which the child can release without the parent's waiters.
static FORK: Mutex<()> = Mutex::new(());

/// The interpreter that imported the module, which is the main one. The stable ABI has no function
/// that returns it without the GIL.
static INTERPRETER: AtomicPtr<ffi::PyInterpreterState> = AtomicPtr::new(null_mut());

fn lock() -> MutexGuard<'static, ()> {
    FORK.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// Held by this thread while it forks.
    static FORKING: RefCell<Vec<Option<MutexGuard<'static, ()>>>> = const { RefCell::new(Vec::new()) };
    static KEPT: KeptState = KeptState::new();
}

/// A thread state that this thread has created. It is kept until the thread ends, because creating
/// one takes microseconds.
struct KeptState(*mut ffi::PyThreadState);

impl KeptState {
    fn new() -> Self {
        guard_thread();
        let _no_fork = lock();
        // Acquire: pairs with the release of the import.
        let interpreter = INTERPRETER.load(Ordering::Acquire);
        // SAFETY: the main interpreter exists, because the caller has found that it is not
        // finalizing. This needs no GIL. The state becomes that of this thread, which has none.
        Self(unsafe { ffi::PyThreadState_New(interpreter) })
    }
}

impl Drop for KeptState {
    fn drop(&mut self) {
        if self.0.is_null() {
            return;
        }
        // SAFETY: on the thread that created it, at its end, without the GIL. If the interpreter
        // finalizes, the thread sleeps in here.
        unsafe {
            ffi::PyEval_RestoreThread(self.0);
            ffi::PyThreadState_Clear(self.0);
            delete_current(self.0);
        }
    }
}

/// Delete the state of this thread and release the GIL.
///
/// # Safety
/// This thread has the GIL, by this state, which is cleared.
#[cfg(not(Py_LIMITED_API))]
unsafe fn delete_current(_state: *mut ffi::PyThreadState) {
    // SAFETY: as the caller says. It is deleted with the GIL held.
    unsafe { ffi::PyThreadState_DeleteCurrent() };
}

/// The same with the functions of the stable ABI, which deletes a state without the GIL.
///
/// # Safety
/// As above.
#[cfg(Py_LIMITED_API)]
unsafe fn delete_current(state: *mut ffi::PyThreadState) {
    // SAFETY: as the caller says. vCPU threads have ended before the interpreter finalizes
    // (`close_all`), so it does not delete the state meanwhile.
    unsafe {
        ffi::PyEval_SaveThread();
        let _no_fork = lock();
        ffi::PyThreadState_Delete(state);
    }
}

/// Before a thread takes the GIL: create its thread state if it has none.
pub(super) fn prepare() {
    // SAFETY: it reads a value of this thread's, and needs no GIL.
    if unsafe { ffi::PyGILState_GetThisThreadState() }.is_null() && !is_ending() {
        // Fails while the thread ends; then one is created for the call alone.
        let _ = KEPT.try_with(|_| ());
    }
}

/// Have Python call the functions below at each fork.
pub(super) fn watch_forks(py: Python<'_>) -> PyResult<()> {
    // SAFETY: this thread has the GIL.
    // Release: pairs with the acquire of a thread that has seen a machine made after this.
    INTERPRETER.store(unsafe { ffi::PyInterpreterState_Get() }, Ordering::Release);
    let function = |name, call: fn(Python<'_>)| {
        let called = move |arguments: &Bound<'_, PyTuple>, _: Option<&Bound<'_, PyDict>>| {
            call(arguments.py());
        };
        PyCFunction::new_closure(py, Some(name), None, called)
    };
    let options = PyDict::new(py);
    options.set_item("before", function(c"before", before)?)?;
    options.set_item("after_in_parent", function(c"after", after)?)?;
    options.set_item("after_in_child", function(c"after", after)?)?;
    import(py, "os")?.call_method("register_at_fork", (), Some(&options)).map(drop)
}

fn before(py: Python<'_>) {
    // One of Python's other functions for forks may itself fork.
    let is_held = FORKING.with_borrow(|forking| !forking.is_empty());
    // Without the GIL: Python's tracing of memory takes it when a thread state is allocated.
    let lock = (!is_held).then(|| py.detach(|| Held(lock())));
    FORKING.with_borrow_mut(|forking| forking.push(lock.map(|Held(lock)| lock)));
}

fn after(_py: Python<'_>) {
    drop(FORKING.with_borrow_mut(Vec::pop));
}

/// The lock, taken on this thread where pyo3 allows only what could be sent to another.
struct Held(MutexGuard<'static, ()>);

// SAFETY: `Python::detach` calls its closure on the same thread.
unsafe impl Send for Held {}
