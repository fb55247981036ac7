//! `Vmm` for Python, continued: the devices that the program adds to the machine's buses. The
//! devices themselves are in `device.rs`; here on the caller's thread.

use std::sync::Arc;

use pyo3::prelude::*;

use super::object::PyVmm;
use crate::devices::{Access, Device};
use crate::error::{Error, ErrorKind};
use crate::py::device::PythonDevice;

impl PyVmm {
    fn add_device(
        &self,
        py: Python<'_>,
        access: Access,
        (base, length): (u64, u64),
        object: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let vmm = self.changing()?;
        let device = PythonDevice::new(object, access, base, &self.hooks.pending)?;
        let device = Arc::new(device);
        let added = Arc::clone(&device) as Arc<dyn Device>;
        py.detach(|| vmm.add_device(access, base, length, added))?;
        self.devices.lock().push(device);
        Ok(())
    }

    fn remove_device(&self, py: Python<'_>, access: Access, base: u64) -> PyResult<Py<PyAny>> {
        let vmm = self.changing()?;
        vmm.vm()?;
        let is_it = |device: &Arc<PythonDevice>| device.is_at(access, base);
        let Some(device) = self.devices.lock().iter().find(|device| is_it(device)).cloned() else {
            let detail = "no added device starts here";
            return Err(Error::new(ErrorKind::Config, format!("{base:#x}"), detail).into());
        };
        py.detach(|| vmm.remove_device(access, base))?;
        self.devices.lock().retain(|known| !Arc::ptr_eq(known, &device));
        Ok(device.object().clone_ref(py))
    }
}

#[pymethods]
impl PyVmm {
    /// Answer the guest's accesses to ports by a Python object.
    ///
    /// It has `read(offset, size)`, `write(offset, size, value)`, or both.
    ///
    /// May be called while the guest runs and from callbacks. The methods are looked up now and
    /// called on the thread of the vCPU; see `pyvmm.devices`.
    ///
    /// Raises:
    ///     ConfigError: the range is not a range of ports, or overlaps another device's.
    ///     TypeError: the object has no device method.
    ///     ClosedError: the machine is closed.
    fn add_pio_device(
        &self,
        py: Python<'_>,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.add_device(py, Access::Pio, (base, length), device)
    }

    /// Answer the guest's accesses to guest-physical addresses without memory.
    ///
    /// Otherwise the same as `add_pio_device`.
    ///
    /// Raises:
    ///     ConfigError: the range overlaps memory or another device's.
    fn add_mmio_device(
        &self,
        py: Python<'_>,
        base: u64,
        length: u64,
        device: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.add_device(py, Access::Mmio, (base, length), device)
    }

    /// Remove the device whose ports start here, and return it. An access in progress is still
    /// answered.
    ///
    /// Raises:
    ///     ConfigError: no added device starts there.
    fn remove_pio_device(&self, py: Python<'_>, base: u64) -> PyResult<Py<PyAny>> {
        self.remove_device(py, Access::Pio, base)
    }

    /// Remove the device whose addresses start here, and return it. Otherwise the same as
    /// `remove_pio_device`.
    fn remove_mmio_device(&self, py: Python<'_>, base: u64) -> PyResult<Py<PyAny>> {
        self.remove_device(py, Access::Mmio, base)
    }

    fn _pio_device(&self, py: Python<'_>, base: u64) -> PyResult<Option<Py<PyAny>>> {
        self.core()?;
        let devices = self.devices.lock();
        let device = devices.iter().find(|device| device.is_at(Access::Pio, base));
        Ok(device.map(|device| device.object().clone_ref(py)))
    }
}
