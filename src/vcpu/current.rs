//! Which vCPU of which machine the current thread runs.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::sync::{Arc, Weak};

use super::handle::VcpuHandle;

thread_local! {
    /// The vCPU whose thread this is.
    static CURRENT: RefCell<Weak<VcpuHandle>> = RefCell::default();
    /// The machine of the vCPU that this thread runs, by its `Shared::id`.
    static MACHINE: Cell<usize> = const { Cell::new(0) };
    /// The vCPU for which this thread calls the program's code, or null.
    static IN_CALLBACK: Cell<*const VcpuHandle> = const { Cell::new(std::ptr::null()) };
}

/// Whether this thread runs a vCPU of that machine. A caller on such a thread is in a callback.
pub(crate) fn is_thread_of(machine: usize) -> bool {
    // Fails once the thread's local storage is destroyed. No callback runs on it then.
    MACHINE.try_with(|current| current.get() == machine).unwrap_or(false)
}

/// The vCPU whose exit is answered on this thread.
#[must_use]
pub fn current() -> Option<Arc<VcpuHandle>> {
    CURRENT.with_borrow(Weak::upgrade)
}

/// Look at the vCPU for which this thread calls the program's code, if it is this one. Cheaper than
/// an upgrade of the reference.
///
/// # Errors
/// Gives `look` back if it is not.
#[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
pub(crate) fn with_vcpu_in_callback<T, F>(which: &Weak<VcpuHandle>, look: F) -> Result<T, F>
where
    F: FnOnce(&VcpuHandle) -> T,
{
    let called = IN_CALLBACK.get();
    if called.is_null() || called != which.as_ptr() {
        return Err(look);
    }
    // SAFETY: `CallbackGuard` on this thread's stack borrows the handle, and is still there when
    // `look` returns.
    Ok(look(unsafe { &*called }))
}

/// While it lives, its thread calls the program's code for a vCPU.
pub(super) struct CallbackGuard<'a>(*const VcpuHandle, PhantomData<&'a VcpuHandle>);

impl<'a> CallbackGuard<'a> {
    pub(super) fn enter(handle: &'a VcpuHandle) -> Self {
        Self(IN_CALLBACK.replace(handle), PhantomData)
    }
}

impl Drop for CallbackGuard<'_> {
    fn drop(&mut self) {
        IN_CALLBACK.set(self.0);
    }
}

/// Make this thread the vCPU's own.
pub(super) fn set_current(handle: &Arc<VcpuHandle>, machine: usize) {
    CURRENT.set(Arc::downgrade(handle));
    MACHINE.set(machine);
}

/// While it lives, its thread runs a vCPU of that machine, perhaps in a callback of another
/// machine.
pub(super) struct CurrentVcpuGuard(Weak<VcpuHandle>, usize);

impl CurrentVcpuGuard {
    pub(super) fn enter(handle: &Arc<VcpuHandle>, machine: usize) -> Self {
        Self(CURRENT.replace(Arc::downgrade(handle)), MACHINE.replace(machine))
    }
}

impl Drop for CurrentVcpuGuard {
    fn drop(&mut self) {
        CURRENT.set(std::mem::take(&mut self.0));
        MACHINE.set(self.1);
    }
}
