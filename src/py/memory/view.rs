//! The buffer behind a memoryview of guest memory.

use std::ffi::{c_int, c_void};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::memory::View;

/// What a memoryview of guest memory holds.
#[pyclass(frozen, name = "_MemoryView", module = "pyvmm")]
#[derive(Debug)]
pub(super) struct PyMemoryView(View);

impl PyMemoryView {
    pub(super) fn of(view: View) -> Self {
        Self(view)
    }
}

#[pymethods]
impl PyMemoryView {
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        buffer: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let view = &slf.get().0;
        let length = ffi::Py_ssize_t::try_from(view.len())
            .map_err(|_| PyBufferError::new_err("the view is too long"))?;
        let readonly = c_int::from(!view.is_writable());
        let start = view.as_ptr().cast::<c_void>();
        // SAFETY: the interpreter hands in a buffer to fill; the memory is mapped as long as this
        // object lives, of which the buffer takes a reference.
        let result =
            unsafe { ffi::PyBuffer_FillInfo(buffer, slf.as_ptr(), start, length, readonly, flags) };
        if result == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}
