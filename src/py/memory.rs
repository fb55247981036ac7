//! `GuestMemory` for Python: bounds-checked copies in and out, at any time, from any thread.

use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::Result;
use crate::vm::GuestMemory;

/// The RAM of a machine, by guest-physical address. Readable and writable at any time, from any thread.
#[pyclass(frozen, weakref, name = "GuestMemory", module = "pyvmm")]
pub struct PyGuestMemory {
    /// Asked each time, so that the memory goes when the machine is closed.
    get: Box<dyn Fn() -> Result<GuestMemory> + Send + Sync>,
}

impl std::fmt::Debug for PyGuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PyGuestMemory").finish_non_exhaustive()
    }
}

impl PyGuestMemory {
    pub(super) fn of<T>(machine: &Arc<T>, get: fn(&T) -> Result<GuestMemory>) -> Self
    where
        T: Send + Sync + 'static,
    {
        let machine = Arc::clone(machine);
        Self { get: Box::new(move || get(&machine)) }
    }
}

#[pymethods]
impl PyGuestMemory {
    /// A copy of guest memory.
    ///
    /// Raises:
    ///     GuestMemoryError: a byte of the range is not RAM.
    ///     StateError: the machine is closed.
    fn read<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        length: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let memory = (self.get)()?;
        // First, so that a length out of range allocates nothing.
        memory.check(address, length)?;
        let length = usize::try_from(length)?;
        PyBytes::new_with(py, length, |data| Ok(memory.read(address, data)?))
    }

    /// Copy bytes into guest memory.
    ///
    /// Raises:
    ///     GuestMemoryError: a byte of the range is not RAM; nothing is written then.
    ///     StateError: the machine is closed.
    fn write(&self, py: Python<'_>, address: u64, data: PyBuffer<u8>) -> PyResult<()> {
        let memory = (self.get)()?;
        if !data.is_c_contiguous() {
            return Err(PyValueError::new_err("data must be contiguous"));
        }
        Ok(memory.write(address, &data.to_vec(py)?)?)
    }

    /// Bytes of RAM.
    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok((self.get)()?.size())
    }

    /// Start and length of each range of RAM: one, or two around the gap from 3 to 4 GiB.
    #[getter]
    fn ranges(&self) -> PyResult<Vec<(u64, u64)>> {
        Ok((self.get)()?.ranges().into_iter().map(|(start, length, _)| (start, length)).collect())
    }

    fn __repr__(&self) -> String {
        match (self.get)() {
            Ok(memory) => format!("GuestMemory(size={:#x})", memory.size()),
            Err(_) => "GuestMemory(closed)".into(),
        }
    }
}
