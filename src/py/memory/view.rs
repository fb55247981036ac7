//! The buffer of a memoryview of guest memory.

use std::ffi::{c_int, c_void};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::error::Result;
use crate::memory::{GuestMemory, View, WritableView};

/// The exporter of a memoryview of guest memory.
#[pyclass(frozen, name = "_MemoryView", module = "pyvmm")]
#[derive(Debug)]
pub(super) struct PyMemoryView(Access);

#[derive(Debug)]
enum Access {
    ReadOnly(View),
    Writable(WritableView),
}

impl PyMemoryView {
    /// A writable view, unless it should be read-only or the memory is.
    pub(super) fn of(
        memory: &GuestMemory,
        (address, length): (u64, u64),
        is_read_only: bool,
    ) -> Result<Self> {
        let view = memory.view(address, length)?;
        Ok(Self(if is_read_only || !view.is_writable() {
            Access::ReadOnly(view)
        } else {
            Access::Writable(memory.writable_view(address, length)?)
        }))
    }
}

#[pymethods]
impl PyMemoryView {
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        buffer: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let (view, readonly) = match &slf.get().0 {
            Access::ReadOnly(view) => (view, 1),
            Access::Writable(writable) => (writable.view(), 0),
        };
        let length = ffi::Py_ssize_t::try_from(view.len())
            .map_err(|_| PyBufferError::new_err("the view is too long"))?;
        let start = view.as_ptr().cast::<c_void>();
        // SAFETY: the interpreter hands in a buffer to fill; the memory is mapped as long as this
        // object lives, of which the buffer takes a reference.
        let result =
            unsafe { ffi::PyBuffer_FillInfo(buffer, slf.as_ptr(), start, length, readonly, flags) };
        if result == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}
