//! The virtio devices of a machine for Python: `Vmm.virtio`.

use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::parts::Part;
use super::vmm::PyVmm;
use crate::error::Error;
use crate::virtio::Attached;

/// A virtio device of a machine: an item of `Vmm.virtio`.
///
/// It holds the machine. Its counts begin with the machine, or the fork.
#[pyclass(frozen, weakref, name = "VirtioDevice", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVirtioDevice {
    vmm: Py<PyVmm>,
    at: usize,
}

impl PyVirtioDevice {
    /// # Errors
    /// `ClosedError` if the machine is closed.
    fn attached(&self) -> PyResult<Attached> {
        let mut all = self.vmm.get().core()?.virtio()?;
        if self.at < all.len() {
            Ok(all.swap_remove(self.at))
        } else {
            Err(Error::closed("machine").into())
        }
    }

    fn count(&self, of: impl Fn(&crate::virtio::Counts) -> &AtomicU64) -> PyResult<u64> {
        let attached = self.attached()?;
        // Relaxed: a count.
        Ok(of(&attached.transport.queues().counts).load(Ordering::Relaxed))
    }
}

#[pymethods]
impl PyVirtioDevice {
    /// Its name, such as "disk0".
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.attached()?.name().to_owned())
    }

    /// The device type (virtio 1.2, section 5), such as 2 for a disk.
    #[getter]
    fn device_type(&self) -> PyResult<u32> {
        Ok(self.attached()?.transport.device().device_type())
    }

    /// The guest-physical address of its registers.
    #[getter]
    fn address(&self) -> PyResult<u64> {
        Ok(self.attached()?.place.base)
    }

    /// Its interrupt line, or None without an interrupt controller.
    #[getter]
    fn irq(&self) -> PyResult<Option<u32>> {
        Ok(self.attached()?.place.line)
    }

    /// The feature bits that the device offers.
    #[getter]
    fn offered(&self) -> PyResult<u64> {
        Ok(self.attached()?.transport.offered())
    }

    /// The feature bits that the driver has accepted, or None while it has not started the device.
    #[getter]
    fn features(&self) -> PyResult<Option<u64>> {
        Ok(self.attached()?.transport.queues().features())
    }

    /// The status field, as the driver reads it: 0 after a reset, 15 for a device in use.
    #[getter]
    fn status(&self) -> PyResult<u8> {
        Ok(self.attached()?.transport.status())
    }

    /// Why the device needed a reset, or what failed behind it, most recently; otherwise None.
    #[getter]
    fn failure(&self) -> PyResult<Option<String>> {
        let attached = self.attached()?;
        let transport = &attached.transport;
        Ok(transport.queues().failure().or_else(|| transport.device().failure()))
    }

    /// How often the loop was notified by the driver.
    #[getter]
    fn notifications(&self) -> PyResult<u64> {
        self.count(|counts| &counts.notifications)
    }

    /// How many descriptor chains were given back to the driver.
    #[getter]
    fn chains(&self) -> PyResult<u64> {
        self.count(|counts| &counts.chains)
    }

    /// How often the device has interrupted the guest.
    #[getter]
    fn interrupts(&self) -> PyResult<u64> {
        self.count(|counts| &counts.interrupts)
    }

    fn __repr__(&self) -> String {
        self.attached().map_or_else(
            |_| "VirtioDevice(unreachable)".into(),
            |attached| {
                let (base, status) = (attached.place.base, attached.transport.status());
                format!("VirtioDevice({}, {base:#x}, status={status})", attached.name())
            },
        )
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vmm)
    }
}

#[pymethods]
impl PyVmm {
    /// The virtio devices, in the order of their addresses; the same objects each time.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[getter]
    fn virtio<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let (py, this) = (slf.py(), slf.get());
        let count = this.core()?.virtio()?.len();
        let device = |at| {
            this.parts.get_or_make(py, Part::Virtio(at), || {
                Bound::new(py, PyVirtioDevice { vmm: slf.clone().unbind(), at })
            })
        };
        PyTuple::new(py, (0..count).map(device).collect::<PyResult<Vec<_>>>()?)
    }
}
