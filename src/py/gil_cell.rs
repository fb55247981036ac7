//! State of the binding that is accessed only with the GIL held, so that the GIL is its lock. In a
//! Python without a GIL, the cell contains a lock. Used on any thread.

use std::fmt;

/// See the module.
pub(super) struct GilCell<T>(Inner<T>);

#[cfg(not(Py_GIL_DISABLED))]
type Inner<T> = std::cell::RefCell<T>;
#[cfg(Py_GIL_DISABLED)]
type Inner<T> = crate::sync::Mutex<T, crate::sync::rank::GilCell>;

// SAFETY: the cell is accessed through `with`, which requires the GIL, and `peek`, whose caller
// holds it. Two threads therefore never access the cell, including its flag, at the same time, and
// each thread sees the changes of the previous one, because the GIL is handed over like a lock. If
// a closure released the GIL, another thread's borrow would fail instead of aliasing.
#[cfg(not(Py_GIL_DISABLED))]
unsafe impl<T: Send> Sync for GilCell<T> {}

impl<T> GilCell<T> {
    pub(super) const fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    /// Access the data. The closure must neither enter Python nor release the GIL.
    pub(super) fn with<R>(&self, _py: pyo3::Python<'_>, f: impl FnOnce(&mut T) -> R) -> R {
        #[cfg(not(Py_GIL_DISABLED))]
        return f(&mut self.0.borrow_mut());
        #[cfg(Py_GIL_DISABLED)]
        f(&mut self.0.lock())
    }

    /// Access the data where pyo3 provides no `Python`. None while it is in use.
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
