//! The end of the interpreter, which threads may outlive: those of vCPUs, and daemon threads that
//! are inside the binding.
//!
//! Once CPython finalizes, it ends every other thread that asks for the GIL with `pthread_exit(3)`
//! (3.14 and newer leave such a thread asleep). That unwinds the thread's stack by force, and Rust
//! aborts the process when its frames are reached. So every thread that enters the binding
//! registers a cleanup handler, which the C library calls before it unwinds the first frame: the
//! handler puts the thread to sleep until the process ends.

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

// The functions behind `pthread_cleanup_push(3)` where it is no macro of try and catch.
unsafe extern "C" {
    fn _pthread_cleanup_push(
        buffer: *mut CleanupBuffer,
        routine: extern "C" fn(*mut c_void),
        argument: *mut c_void,
    );
    fn _pthread_cleanup_pop(buffer: *mut CleanupBuffer, execute: c_int);
}

/// `Py_IsFinalizing`, or what it is called before Python 3.13: found when the module is imported.
static IS_FINALIZING: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Find what tells that the interpreter ends. As the module is imported.
pub(crate) fn prepare() {
    let find = |name: &CStr| {
        // SAFETY: a name that ends with a zero.
        unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
    };
    let found = [c"Py_IsFinalizing", c"_Py_IsFinalizing"].map(find);
    let found = found.into_iter().find(|function| !function.is_null());
    // Relaxed: a code address, which is the same for every thread.
    IS_FINALIZING.store(found.unwrap_or(ptr::null_mut()), Ordering::Relaxed);
}

/// Whether the interpreter finalizes: then no thread but the one that does so gets the GIL.
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

/// A thread's registration, with the buffer at an address that does not change.
///
/// The C library calls a handler as soon as it unwinds past the address of its buffer on the stack.
/// This buffer is on the heap, which it takes for the outside of the frames that are left: the
/// handler is called before the first of them is unwound.
struct Registration(Box<UnsafeCell<CleanupBuffer>>);

impl Registration {
    fn new() -> Self {
        let (argument, previous) = (ptr::null_mut(), ptr::null_mut());
        let buffer = CleanupBuffer { routine: None, argument, cancel_type: 0, previous };
        let buffer = Box::new(UnsafeCell::new(buffer));
        // SAFETY: the buffer stays where it is until this thread takes it back as it ends. The C
        // library alone uses it.
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

/// The C library's exit of a thread has begun. Where Python ends, that is where the thread stays;
/// any other goes on.
extern "C" fn stay(_argument: *mut c_void) {
    // Relaxed: as in `is_ending`.
    if is_ending() || IS_FINALIZING.load(Ordering::Relaxed).is_null() {
        sleep_until_the_process_ends();
    }
}

/// What remains for a thread that can get the GIL no more.
pub(super) fn sleep_until_the_process_ends() -> ! {
    loop {
        // SAFETY: no arguments. It returns after a signal's handler.
        unsafe { libc::pause() };
    }
}

/// This thread may run Python code inside the binding. Cheap but for the first time.
pub(super) fn guard_thread() {
    // Fails as the thread ends, and then it runs no more code of the program's.
    let _ = REGISTRATION.try_with(|_| ());
}

/// # Errors
/// [`ErrorKind::State`] where the interpreter ends: other threads sleep, so nothing can be waited
/// for.
pub(super) fn check() -> Result<()> {
    guard_thread();
    if !is_ending() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::State, "pyvmm", "the interpreter is ending: nothing runs any more"))
}

/// Import a module, which runs Python code: as everything that does so, on a thread that is
/// guarded.
pub(super) fn import<'py>(
    py: Python<'py>,
    name: impl IntoPyObject<'py, Target = PyString>,
) -> PyResult<Bound<'py, PyModule>> {
    guard_thread();
    py.import(name)
}
