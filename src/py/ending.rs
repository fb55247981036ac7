//! Handles the end of the interpreter, which vCPU threads and daemon threads inside the binding may
//! outlive. Once CPython finalizes, it ends every other thread that requests the GIL with
//! `pthread_exit(3)` (3.14 and newer leave such a thread asleep). This is a forced unwinding of the
//! thread's stack, and Rust aborts the process when it reaches a Rust frame. Every thread that
//! enters the binding therefore registers a cleanup handler. The C library calls it before it
//! unwinds the first frame, and the handler puts the thread to sleep until the process ends.

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::error::{Error, ErrorKind, Result};

/// `struct _pthread_cleanup_buffer` of the C library.
#[repr(C)]
struct CleanupBuffer {
    routine: Option<extern "C" fn(*mut c_void)>,
    argument: *mut c_void,
    cancel_type: c_int,
    previous: *mut Self,
}

// The functions that `pthread_cleanup_push(3)` uses where it is not a macro with try and catch.
unsafe extern "C" {
    fn _pthread_cleanup_push(
        buffer: *mut CleanupBuffer,
        routine: extern "C" fn(*mut c_void),
        argument: *mut c_void,
    );
    fn _pthread_cleanup_pop(buffer: *mut CleanupBuffer, execute: c_int);
}

/// `Py_IsFinalizing`, or its name before Python 3.13. Looked up when the module is imported.
static IS_FINALIZING: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Look up the function that reports finalization. Called when the module is imported.
pub(crate) fn prepare() {
    let find = |name: &CStr| {
        // SAFETY: a zero-terminated name.
        unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
    };
    let found = [c"Py_IsFinalizing", c"_Py_IsFinalizing"].map(find);
    let found = found.into_iter().find(|function| !function.is_null());
    // Relaxed: a code address, which is the same for every thread.
    IS_FINALIZING.store(found.unwrap_or(ptr::null_mut()), Ordering::Relaxed);
}

/// Whether the interpreter is finalizing. Then only the finalizing thread gets the GIL.
pub(super) fn is_ending() -> bool {
    let function = IS_FINALIZING.load(Ordering::Relaxed);
    if function.is_null() {
        return false;
    }
    // SAFETY: both functions have this type, and only read a word of the runtime.
    let function =
        unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(function) };
    function() != 0
}

/// A thread's registration, with the buffer at an address that does not change. The C library calls
/// a handler as soon as it unwinds past the address of its buffer on the stack. This buffer is on
/// the heap, which the C library considers outside the remaining frames, so it calls the handler
/// before it unwinds the first one.
struct Registration(Box<UnsafeCell<CleanupBuffer>>);

impl Registration {
    fn new() -> Self {
        let (argument, previous) = (ptr::null_mut(), ptr::null_mut());
        let buffer = CleanupBuffer { routine: None, argument, cancel_type: 0, previous };
        let buffer = Box::new(UnsafeCell::new(buffer));
        // SAFETY: the buffer does not move until this thread removes it at its end. Only the C
        // library uses it.
        unsafe { _pthread_cleanup_push(buffer.get(), stay, ptr::null_mut()) };
        Self(buffer)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: on the thread that registered it, which has left every frame that could have
        // registered others.
        unsafe { _pthread_cleanup_pop(self.0.get(), 0) };
    }
}

thread_local! {
    static REGISTRATION: Registration = Registration::new();
}

/// Called when the C library begins the exit of a thread. If Python is finalizing, the thread stays
/// here; otherwise its exit continues.
extern "C" fn stay(_argument: *mut c_void) {
    // Relaxed: as in `is_ending`.
    if is_ending() || IS_FINALIZING.load(Ordering::Relaxed).is_null() {
        sleep_until_the_process_ends();
    }
}

/// Put a thread to sleep that can no longer get the GIL.
pub(super) fn sleep_until_the_process_ends() -> ! {
    loop {
        // SAFETY: no arguments. It returns after a signal handler.
        unsafe { libc::pause() };
    }
}

/// Called before this thread runs Python code inside the binding. Cheap except for the first call.
pub(super) fn guard_thread() {
    // Fails while the thread ends, when it no longer runs code of the program.
    let _ = REGISTRATION.try_with(|_| ());
}

/// # Errors
/// [`ErrorKind::State`] while the interpreter finalizes, because other threads sleep and cannot be
/// waited for.
pub(super) fn check() -> Result<()> {
    guard_thread();
    if !is_ending() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::State, "pyvmm", "the interpreter is finalizing"))
}

/// Import a module. This runs Python code, so the thread is guarded first.
pub(super) fn import<'py>(
    py: Python<'py>,
    name: impl IntoPyObject<'py, Target = PyString>,
) -> PyResult<Bound<'py, PyModule>> {
    guard_thread();
    py.import(name)
}
