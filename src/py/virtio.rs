//! The virtio devices of a machine for Python: `Vmm.virtio`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{PyClass, PyTypeInfo};

use super::parts::Part;
use super::vmm::PyVmm;
use crate::error::{Error, ErrorKind};
use crate::virtio::{Attached, VirtioDevice};

/// The devices of one kind among a machine's virtio devices, in order.
pub(super) fn devices_of<T: VirtioDevice + 'static>(
    all: Vec<Attached>,
) -> impl Iterator<Item = (Attached, Arc<T>)> {
    all.into_iter().filter_map(|attached| {
        let device = attached.transport.device_as()?;
        Some((attached, device))
    })
}

/// One of these devices of an object's machine.
///
/// # Errors
/// `ClosedError` if the machine is closed.
pub(super) fn nth<T: VirtioDevice + 'static>(
    vmm: &Py<PyVmm>,
    at: usize,
) -> PyResult<(Attached, Arc<T>)> {
    let all = vmm.get().core()?.virtio()?;
    devices_of(all).nth(at).ok_or_else(|| Error::closed("machine").into())
}

/// The device of a kind that a machine has at most one of.
///
/// # Errors
/// `ConfigError` with the hint if the machine has none.
pub(super) fn only<T: VirtioDevice + 'static>(
    vmm: &PyVmm,
    key: &str,
    hint: &'static str,
) -> PyResult<Arc<T>> {
    let found = devices_of(vmm.core()?.virtio()?).next().map(|(_, device)| device);
    found
        .ok_or_else(|| Error::new(ErrorKind::Config, key, "the machine has none").hint(hint).into())
}

/// The objects of so many parts of a machine, the same ones each time.
pub(super) fn objects<'py, T: PyClass + PyTypeInfo>(
    vmm: &Bound<'py, PyVmm>,
    count: usize,
    part: impl Fn(usize) -> Part,
    make: impl Fn(Py<PyVmm>, usize) -> PyResult<Bound<'py, T>>,
) -> PyResult<Bound<'py, PyTuple>> {
    let object = |at| {
        let parts = &vmm.get().parts;
        parts.get_or_make(vmm.py(), part(at), || make(vmm.clone().unbind(), at))
    };
    PyTuple::new(vmm.py(), (0..count).map(object).collect::<PyResult<Vec<_>>>()?)
}

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

    /// How many descriptor chains the device has taken from the driver.
    #[getter]
    fn taken(&self) -> PyResult<u64> {
        self.count(|counts| &counts.taken)
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

    /// How many bytes those chains had for the device, with the headers of requests.
    #[getter]
    fn bytes_from_guest(&self) -> PyResult<u64> {
        self.count(|counts| &counts.bytes_from_guest)
    }

    /// How many bytes the device has written to those chains, with the headers of replies.
    #[getter]
    fn bytes_to_guest(&self) -> PyResult<u64> {
        self.count(|counts| &counts.bytes_to_guest)
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
        let (py, count) = (slf.py(), slf.get().core()?.virtio()?.len());
        objects(slf, count, Part::Virtio, |vmm, at| Bound::new(py, PyVirtioDevice { vmm, at }))
    }
}
