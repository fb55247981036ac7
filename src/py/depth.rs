//! How deep the program and pyvmm may call each other on one thread. Python limits its own calls,
//! not the stack that native code between them takes, and a vCPU's thread may have 2 MiB. Checked
//! where native code calls the program.

use std::cell::Cell;

use pyo3::exceptions::PyRecursionError;
use pyo3::prelude::*;

use crate::vcpu::stack_limit;

/// Bytes of stack that a callback finds, at least: enough for the calls of pyvmm that it makes, and
/// for Python code between them. A small stack keeps a quarter.
const RESERVE: usize = 256 << 10;

/// The addresses of a stack.
#[derive(Clone, Copy)]
struct Stack {
    low: usize,
    high: usize,
}

thread_local! {
    /// This thread's, once it is known. Empty if the C library cannot tell.
    static STACK: Cell<Option<Stack>> = const { Cell::new(None) };
}

/// The stack that the C library knows for this thread.
fn of_this_thread() -> Stack {
    let mut low = std::ptr::null_mut();
    let mut size = 0;
    // SAFETY: attributes of zeros are overwritten by the call that makes them, and given back once.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        // Fails where /proc is not mounted.
        if libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes) == 0 {
            libc::pthread_attr_getstack(&raw const attributes, &raw mut low, &raw mut size);
            libc::pthread_attr_destroy(&raw mut attributes);
        }
    }
    let high = low.addr().saturating_add(size);
    // musl reports only as much of the main thread's stack as is in use, and it grows.
    let grows = !cfg!(target_env = "gnu") && is_main_thread();
    let low = if grows { low.addr().min(high.saturating_sub(stack_limit())) } else { low.addr() };
    Stack { low, high }
}

fn is_main_thread() -> bool {
    // SAFETY: both take nothing and cannot fail.
    unsafe { libc::gettid() == libc::getpid() }
}

/// Whether a frame at this address leaves enough of the stack below it. A frame outside of the
/// stack belongs to a library that switches stacks, and nothing is known of those.
fn has_room(stack: Stack, at: usize) -> bool {
    let Stack { low, high } = stack;
    let reserve = RESERVE.min((high - low) / 4);
    !(low..high).contains(&at) || at - low >= reserve
}

/// # Errors
/// RecursionError if little of this thread's stack is left.
pub(super) fn check() -> PyResult<()> {
    let stack = STACK.get().unwrap_or_else(|| {
        let stack = of_this_thread();
        STACK.set(Some(stack));
        stack
    });
    let here = 0u8;
    if has_room(stack, (&raw const here).addr()) {
        return Ok(());
    }
    let text = "a callback and pyvmm call each other too deeply for the stack of this thread";
    Err(PyRecursionError::new_err(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_a_small_stack_is_kept_and_other_stacks_are_left_alone() {
        let large = Stack { low: 1 << 30, high: (1 << 30) + (8 << 20) };
        assert!(has_room(large, large.low + RESERVE));
        assert!(!has_room(large, large.low + RESERVE - 1));
        assert!(has_room(large, large.low - 1) && has_room(large, large.high));
        let small = Stack { low: 1 << 30, high: (1 << 30) + (64 << 10) };
        assert!(has_room(small, small.low + (16 << 10)));
        assert!(!has_room(small, small.low + (16 << 10) - 1));
        assert!(has_room(Stack { low: 0, high: 0 }, 1));
    }

    #[test]
    fn this_frame_lies_in_the_stack_of_its_thread() {
        let Stack { low, high } = of_this_thread();
        let here = 0u8;
        assert!((low..high).contains(&(&raw const here).addr()));
    }
}
