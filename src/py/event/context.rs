//! Context variables: each callback of a loop runs in the context in which it was registered or
//! requested, as in asyncio. The context of the loop's caller does not change.

use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;

#[cfg(not(Py_LIMITED_API))]
use pyo3::ffi::{PyContext_Copy, PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit};

// The limited API omits them, although they have not changed since Python 3.7.1.
#[cfg(Py_LIMITED_API)]
unsafe extern "C" {
    fn PyContext_Copy(context: *mut ffi::PyObject) -> *mut ffi::PyObject;
    fn PyContext_CopyCurrent() -> *mut ffi::PyObject;
    fn PyContext_Enter(context: *mut ffi::PyObject) -> std::ffi::c_int;
    fn PyContext_Exit(context: *mut ffi::PyObject) -> std::ffi::c_int;
}

/// A `contextvars.Context`.
#[derive(Debug)]
pub(crate) struct Context(Py<PyAny>);

impl Context {
    /// A copy of this thread's current context.
    pub(crate) fn copy_current(py: Python<'_>) -> PyResult<Self> {
        // SAFETY: with the GIL held; a new reference or an exception.
        let copy = unsafe { Bound::from_owned_ptr_or_err(py, PyContext_CopyCurrent()) }?;
        Ok(Self(copy.unbind()))
    }

    /// The context passed by the program. None means a copy of this thread's current context.
    pub(crate) fn given(context: Option<&Bound<'_, PyAny>>, py: Python<'_>) -> PyResult<Self> {
        let Some(context) = context else { return Self::copy_current(py) };
        let class = py.import("contextvars")?.getattr("Context")?;
        if !context.is_instance(&class)? {
            let text = format!("expected a contextvars.Context, not {}", context.get_type());
            return Err(pyo3::exceptions::PyTypeError::new_err(text));
        }
        Ok(Self(context.clone().unbind()))
    }

    pub(crate) fn clone_ref(&self, py: Python<'_>) -> Self {
        Self(self.0.clone_ref(py))
    }

    pub(crate) fn object(&self) -> &Py<PyAny> {
        &self.0
    }

    /// Call in the context. If it is already entered, by a callback that called back into the loop,
    /// a copy is used.
    pub(crate) fn run<T>(&self, py: Python<'_>, call: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
        // SAFETY: a context, with the GIL held.
        if unsafe { PyContext_Enter(self.0.as_ptr()) } == 0 {
            return leave(py, self.0.as_ptr(), call());
        }
        drop(PyErr::take(py));
        // SAFETY: as above; a new reference or an exception.
        let copy = unsafe { Bound::from_owned_ptr_or_err(py, PyContext_Copy(self.0.as_ptr())) }?;
        // SAFETY: as above.
        if unsafe { PyContext_Enter(copy.as_ptr()) } < 0 {
            return Err(PyErr::fetch(py));
        }
        leave(py, copy.as_ptr(), call())
    }
}

/// Leave the context that this thread entered last.
fn leave<T>(py: Python<'_>, context: *mut ffi::PyObject, result: PyResult<T>) -> PyResult<T> {
    debug_assert!(!ptr::eq(context, ptr::null_mut()));
    // SAFETY: a context that the caller holds and has entered, with the GIL held.
    if unsafe { PyContext_Exit(context) } < 0 {
        let failure = PyErr::fetch(py);
        return result.and(Err(failure));
    }
    result
}
