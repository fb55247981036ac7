//! State of the binding that is reached only with the GIL held, so that the GIL is its lock. Where
//! Python has no GIL, it has a lock of its own. On any thread.

use std::fmt;

/// See the module.
pub(super) struct GilCell<T>(Inner<T>);

#[cfg(not(Py_GIL_DISABLED))]
type Inner<T> = std::cell::RefCell<T>;
#[cfg(Py_GIL_DISABLED)]
type Inner<T> = crate::sync::Mutex<T, crate::sync::rank::GilCell>;

// SAFETY: the cell is reached through `with`, which asks for the GIL, and `peek`, whose caller has
// it. So no two threads are at the cell, its flag included, at once, and what one leaves there the
// next one sees: the GIL's handover is a lock's. A closure that let the GIL go would have another
// thread's borrow fail, not alias.
#[cfg(not(Py_GIL_DISABLED))]
unsafe impl<T: Send> Sync for GilCell<T> {}

impl<T> GilCell<T> {
    pub(super) const fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    /// Look at it or change it. The closure must neither enter Python nor let the GIL go.
    pub(super) fn with<R>(&self, _py: pyo3::Python<'_>, f: impl FnOnce(&mut T) -> R) -> R {
        #[cfg(not(Py_GIL_DISABLED))]
        return f(&mut self.0.borrow_mut());
        #[cfg(Py_GIL_DISABLED)]
        f(&mut self.0.lock())
    }

    /// Look at it where pyo3 hands out no `Python`; none while it is in use.
    ///
    /// # Safety
    /// The caller holds the GIL.
    pub(super) unsafe fn peek<R>(&self, f: impl FnOnce(&T) -> R) -> Option<R> {
        #[cfg(not(Py_GIL_DISABLED))]
        return self.0.try_borrow().ok().map(|value| f(&value));
        #[cfg(Py_GIL_DISABLED)]
        self.0.try_lock().map(|value| f(&value))
    }
}

impl<T: Default> Default for GilCell<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> fmt::Debug for GilCell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GilCell").finish_non_exhaustive()
    }
}
