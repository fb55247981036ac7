//! The disks of a machine for Python: `Vmm.disks`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::parts::Part;
use super::virtio;
use super::vmm::PyVmm;
use crate::error::{Error, ErrorKind};
use crate::virtio::{Attached, Blk, DiskCounts, VirtioDevice};

/// A disk of a machine: an item of `Vmm.disks`.
///
/// It holds the machine. Its counts begin with the machine, or the fork.
#[pyclass(frozen, weakref, name = "DiskDevice", module = "pyvmm")]
#[derive(Debug)]
pub struct PyDiskDevice {
    vmm: Py<PyVmm>,
    at: usize,
}

impl PyDiskDevice {
    /// # Errors
    /// `ClosedError` if the machine is closed.
    fn device(&self) -> PyResult<(Attached, Arc<Blk>)> {
        virtio::nth(&self.vmm, self.at)
    }

    fn count(&self, of: impl Fn(&DiskCounts) -> &AtomicU64) -> PyResult<u64> {
        // Relaxed: a count.
        self.device().map(|(_, device)| of(device.counts()).load(Ordering::Relaxed))
    }
}

#[pymethods]
impl PyDiskDevice {
    /// Its name, such as "disk0".
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.device()?.0.name().to_owned())
    }

    /// The size in bytes. The guest sees whole sectors of 512 bytes.
    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.device()?.1.disk().size())
    }

    /// Whether the guest cannot write it.
    #[getter]
    fn read_only(&self) -> PyResult<bool> {
        Ok(self.device()?.1.disk().is_read_only())
    }

    /// The serial number that the guest sees.
    #[getter]
    fn serial(&self) -> PyResult<String> {
        let (_, device) = self.device()?;
        let bytes = device.serial().split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// The last request that failed, and why; None if none did.
    #[getter]
    fn failure(&self) -> PyResult<Option<String>> {
        Ok(self.device()?.1.failure())
    }

    /// How many requests to read there were.
    #[getter]
    fn reads(&self) -> PyResult<u64> {
        self.count(|counts| &counts.reads)
    }

    /// How many requests to write there were.
    #[getter]
    fn writes(&self) -> PyResult<u64> {
        self.count(|counts| &counts.writes)
    }

    /// How many requests to flush there were.
    #[getter]
    fn flushes(&self) -> PyResult<u64> {
        self.count(|counts| &counts.flushes)
    }

    /// How many requests to discard, or to write zeroes, there were.
    #[getter]
    fn discards(&self) -> PyResult<u64> {
        self.count(|counts| &counts.discards)
    }

    /// How many bytes the guest has read.
    #[getter]
    fn bytes_read(&self) -> PyResult<u64> {
        self.count(|counts| &counts.bytes_read)
    }

    /// How many bytes the guest has written.
    #[getter]
    fn bytes_written(&self) -> PyResult<u64> {
        self.count(|counts| &counts.bytes_written)
    }

    /// How many requests failed.
    #[getter]
    fn errors(&self) -> PyResult<u64> {
        self.count(|counts| &counts.errors)
    }

    /// Change the size, also while the guest runs, and tell the guest.
    ///
    /// A file grows or shrinks with it. The object of a program is not changed: it has the new size
    /// already.
    ///
    /// Args:
    ///     size: in bytes, a multiple of 512.
    ///
    /// Raises:
    ///     ConfigError: the size is no multiple of 512, or too large.
    ///     StateError: a snapshot needs what would be cut off, or the disk has a fixed size.
    ///     StreamError: the file cannot have this size.
    ///     ClosedError: the machine is closed.
    fn resize(&self, py: Python<'_>, size: u64) -> PyResult<()> {
        self.vmm.get().changing()?;
        let (attached, device) = self.device()?;
        let name = attached.name();
        if !size.is_multiple_of(512) || size > i64::MAX.unsigned_abs() {
            let detail = format!("{size} is no multiple of 512 below 2**63");
            return Err(Error::new(ErrorKind::Config, format!("{name}.size"), detail).into());
        }
        let resized = py.detach(|| device.disk().resize(size));
        resized.map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy | io::ErrorKind::Unsupported => {
                Error::new(ErrorKind::State, name, error.to_string())
            }
            _ => Error::os(ErrorKind::Io, name, &error),
        })?;
        py.detach(|| attached.transport.queues().config_changed());
        Ok(())
    }

    fn __repr__(&self) -> String {
        self.device().map_or_else(
            |_| "DiskDevice(unreachable)".into(),
            |(attached, device)| {
                format!("DiskDevice({}, size={})", attached.name(), device.disk().size())
            },
        )
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vmm)
    }
}

#[pymethods]
impl PyVmm {
    /// The disks, in the order of their configuration; the same objects each time.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[getter]
    fn disks<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let count = virtio::devices_of::<Blk>(slf.get().core()?.virtio()?).count();
        virtio::objects(slf, count, Part::Disk, |vmm, at| Bound::new(py, PyDiskDevice { vmm, at }))
    }
}
