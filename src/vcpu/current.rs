//! Which vCPU, and which machine's, a thread runs.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Weak};

use super::handle::VcpuHandle;

thread_local! {
    /// The vCPU whose thread this is.
    static CURRENT: RefCell<Weak<VcpuHandle>> = RefCell::default();
    /// The machine that this thread runs a vCPU of, by its `Shared::id`.
    static MACHINE: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread runs a vCPU of that machine: if it asks, it is in one of its callbacks.
pub(crate) fn is_thread_of(machine: usize) -> bool {
    // Fails when the thread's own values are gone: then it runs no callback any more.
    MACHINE.try_with(|current| current.get() == machine).unwrap_or(false)
}

/// The vCPU whose exit is answered on this thread.
#[must_use]
pub fn current() -> Option<Arc<VcpuHandle>> {
    CURRENT.with_borrow(Weak::upgrade)
}

/// This thread is the vCPU's from here on.
pub(super) fn set_current(handle: &Arc<VcpuHandle>, machine: usize) {
    CURRENT.set(Arc::downgrade(handle));
    MACHINE.set(machine);
}
