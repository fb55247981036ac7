//! The registers of a vCPU as bytes and numbers, to which `pyvmm.registers` gives names.

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::processor::Processor;
use crate::vcpu::RegisterClass;

/// One class of a vCPU's registers, as the bytes of the kernel's structure. `pyvmm.registers` names
/// them.
#[pyclass(frozen, name = "RegisterBytes", module = "pyvmm")]
#[derive(Debug)]
pub struct PyRegisterBytes {
    pub(super) processor: Processor,
    pub(super) class: RegisterClass,
}

fn outside() -> PyErr {
    PyValueError::new_err("these bytes are outside the registers")
}

#[pymethods]
impl PyRegisterBytes {
    /// Return the little-endian number of 1 to 8 bytes at an offset.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    pub(super) fn load(&self, py: Python<'_>, offset: usize, size: usize) -> PyResult<u64> {
        let number =
            self.processor.with_vcpu(py, |vcpu| vcpu.load_number(self.class, offset, size))?;
        number.ok_or_else(outside)
    }

    /// Write a number of 1 to 8 bytes at an offset.
    ///
    /// Raises:
    ///     OverflowError: the number has more bits.
    ///     KvmError: KVM refuses it; nothing changes.
    ///     StateError: the guest is running, or the machine is closed.
    pub(super) fn store(
        &self,
        py: Python<'_>,
        offset: usize,
        size: usize,
        value: u64,
    ) -> PyResult<()> {
        let number = value.to_le_bytes();
        let Some((low, high)) = number.split_at_checked(size) else {
            return Err(outside());
        };
        if high.iter().any(|byte| *byte != 0) {
            let detail = format!("{value:#x} does not fit into {} bits", 8 * size);
            return Err(PyOverflowError::new_err(detail));
        }
        self.replace(py, offset, low)
    }

    /// Return all bytes.
    ///
    /// Raises:
    ///     StateError: the guest is running, or the machine is closed.
    fn read<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.processor.with_vcpu(py, |vcpu| vcpu.load(self.class, <[u8]>::to_vec))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Write bytes at an offset. Raises the same exceptions as `store`.
    fn replace(&self, py: Python<'_>, offset: usize, bytes: &[u8]) -> PyResult<()> {
        let mut is_inside = false;
        self.processor.with_vcpu(py, |vcpu| {
            vcpu.store(self.class, |all| {
                let end = offset.saturating_add(bytes.len());
                if let Some(to) = all.get_mut(offset..end) {
                    to.copy_from_slice(bytes);
                    is_inside = true;
                }
            })
        })?;
        if is_inside { Ok(()) } else { Err(outside()) }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        self.processor.traverse(&visit)
    }
}

/// What every view of registers has: the bytes of a kernel's structure, from an offset on.
#[pyclass(frozen, subclass, name = "RegisterView", module = "pyvmm")]
#[derive(Debug)]
pub struct PyRegisterView {
    registers: Py<PyRegisterBytes>,
    base: usize,
}

#[pymethods]
impl PyRegisterView {
    #[new]
    #[pyo3(signature = (registers, base = 0))]
    fn new(registers: Py<PyRegisterBytes>, base: usize) -> Self {
        Self { registers, base }
    }

    #[getter(_registers)]
    fn registers(&self, py: Python<'_>) -> Py<PyRegisterBytes> {
        self.registers.clone_ref(py)
    }

    #[getter(_base)]
    fn base(&self) -> usize {
        self.base
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.registers)
    }
}

/// A register of a view: an int of this many bytes, at an offset.
///
/// Written in Rust, because hooks read registers at each exit.
#[pyclass(frozen, name = "Register", module = "pyvmm")]
#[derive(Debug)]
pub struct PyRegister {
    /// Where it is in the view.
    #[pyo3(get)]
    offset: usize,
    /// Its bytes.
    #[pyo3(get)]
    size: usize,
}

#[pymethods]
impl PyRegister {
    #[new]
    #[pyo3(signature = (offset, size = 8))]
    fn new(offset: usize, size: usize) -> Self {
        Self { offset, size }
    }

    fn __get__<'py>(
        slf: &Bound<'py, Self>,
        view: Option<&Bound<'py, PyAny>>,
        _owner: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let Some(view) = view else { return Ok(slf.clone().into_any()) };
        let (this, view) = (slf.get(), view.cast::<PyRegisterView>()?.get());
        let at = view.base.saturating_add(this.offset);
        let number = view.registers.get().load(slf.py(), at, this.size)?;
        Ok(number.into_pyobject(slf.py())?.into_any())
    }

    fn __set__(&self, view: &Bound<'_, PyAny>, value: u64) -> PyResult<()> {
        let (py, view) = (view.py(), view.cast::<PyRegisterView>()?.get());
        let at = view.base.saturating_add(self.offset);
        view.registers.get().store(py, at, self.size, value)
    }
}

/// Model-specific registers by number. `pyvmm.registers` names them.
#[pyclass(frozen, name = "MsrBytes", module = "pyvmm")]
#[derive(Debug)]
pub struct PyMsrBytes {
    pub(super) processor: Processor,
}

#[pymethods]
impl PyMsrBytes {
    /// Return the register's value.
    ///
    /// Raises:
    ///     KvmError: KVM does not know the register.
    ///     StateError: the guest is running, or the machine is closed.
    fn load(&self, py: Python<'_>, index: u32) -> PyResult<u64> {
        self.processor.with_vcpu(py, |vcpu| vcpu.msr(index))
    }

    /// Set the register. Raises the same exceptions as `load`.
    fn store(&self, py: Python<'_>, index: u32, value: u64) -> PyResult<()> {
        self.processor.change(py, |vcpu| vcpu.set_msr(index, value))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        self.processor.traverse(&visit)
    }
}
