//! The stack of vCPU threads, on which callbacks run. Its size is the same for every machine of the
//! process.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, JoinHandle};

use crate::error::{Error, ErrorKind, Result};

/// The minimum: Rust's own default.
const LEAST: usize = 2 << 20;

/// The size that the program has chosen, in bytes; 0 for the C library's default.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// Set the stack size of threads that are started from now on, in bytes; 0 for the C library's
/// default, which is RLIMIT_STACK.
pub fn set_stack_size(bytes: usize) {
    // Relaxed: a single number, for threads that the caller starts later.
    CHOSEN.store(bytes, Ordering::Relaxed);
}

/// The stack size of the next thread, in bytes of address space. Memory is allocated as it is used.
pub(super) fn size() -> usize {
    match CHOSEN.load(Ordering::Relaxed) {
        0 => default_size(),
        chosen => chosen,
    }
    .max(LEAST)
}

/// Start a thread on which Python code may run.
///
/// # Errors
/// If the process has no address space for its stack, or may not have more threads.
pub(crate) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let size = size();
    let thread = Builder::new().name(name.clone()).stack_size(size).spawn(run);
    thread.map_err(|e| {
        let reason = format!("a thread with {} KiB of stack cannot be started: {e}", size >> 10);
        let error = Error { errno: e.raw_os_error(), ..Error::new(ErrorKind::Kvm, name, reason) };
        error.hint(
            "lower threading.stack_size() or RLIMIT_STACK, or raise the limits on threads and \
             address space",
        )
    })
}

/// RLIMIT_STACK: the most that the main thread's stack can grow to. 8 MiB if there is no limit.
pub(crate) fn stack_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call fills the structure.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_STACK, &raw mut limit) };
    match usize::try_from(limit.rlim_cur) {
        Ok(bytes) if got == 0 && limit.rlim_cur != libc::RLIM_INFINITY => bytes,
        _ => 8 << 20,
    }
}

/// That of the C library. Musl's, 128 KiB, is too small for Python: other threads get the limit of
/// the main one there, as they do with glibc.
fn default_size() -> usize {
    if !cfg!(target_env = "gnu") {
        return stack_limit();
    }
    let mut size = 0;
    // SAFETY: the call initializes the attributes, and they are destroyed once.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        if libc::pthread_attr_init(&raw mut attributes) == 0 {
            libc::pthread_attr_getstacksize(&raw const attributes, &raw mut size);
            libc::pthread_attr_destroy(&raw mut attributes);
        }
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_what_was_chosen_or_the_default() {
        assert_eq!(size(), default_size().max(LEAST));
        set_stack_size(64 << 20);
        assert_eq!(size(), 64 << 20);
        set_stack_size(32 << 10);
        assert_eq!(size(), LEAST);
        set_stack_size(0);
        // glibc's default is the limit at the start of the program, which has not changed it.
        assert!(stack_limit() >= default_size());
    }
}
