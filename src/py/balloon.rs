//! The memory balloon of a machine for Python: `Vmm.balloon`.

use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::parts::Part;
use super::virtio;
use super::vmm::PyVmm;
use crate::virtio::Balloon;

/// The names of statistics, by tag (virtio 1.2, 5.5.6.4).
const NAMES: [&str; 10] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
];

/// The memory balloon of a machine: `Vmm.balloon`. It holds the machine.
#[pyclass(frozen, weakref, name = "BalloonDevice", module = "pyvmm")]
#[derive(Debug)]
pub struct PyBalloonDevice(Py<PyVmm>);

impl PyBalloonDevice {
    fn device(&self) -> PyResult<Arc<Balloon>> {
        Ok(virtio::nth(&self.0, 0)?.1)
    }
}

#[pymethods]
impl PyBalloonDevice {
    /// How much memory the guest is to give, in MiB. Set it to ask for more, or to give some back.
    #[getter]
    fn target_mib(&self) -> PyResult<u32> {
        Ok(self.device()?.size().0)
    }

    #[setter]
    fn set_target_mib(&self, py: Python<'_>, mib: u32) -> PyResult<()> {
        self.0.get().changing()?;
        let device = self.device()?;
        py.detach(|| device.set_target(mib));
        Ok(())
    }

    /// How much memory the guest says that it has given, in MiB.
    #[getter]
    fn actual_mib(&self) -> PyResult<u32> {
        Ok(self.device()?.size().1)
    }

    /// The guest's newest statistics, by name: bytes of memory, and counts.
    ///
    /// Linux sends "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory",
    /// "total_memory", "available_memory", "disk_caches", and since 4.16 also
    /// "hugetlb_allocations" and "hugetlb_failures". Empty before the first, and without
    /// `Balloon(statistics_s=...)`.
    #[getter]
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = PyDict::new(py);
        for (tag, value) in self.device()?.statistics() {
            if let Some(name) = NAMES.get(usize::from(tag)) {
                found.set_item(name, value)?;
            }
        }
        Ok(found)
    }

    fn __repr__(&self) -> String {
        self.device().map_or_else(
            |_| "BalloonDevice(unreachable)".into(),
            |device| {
                let (target, actual) = device.size();
                format!("BalloonDevice(target_mib={target}, actual_mib={actual})")
            },
        )
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}

#[pymethods]
impl PyVmm {
    /// The memory balloon; the same object each time.
    ///
    /// Raises:
    ///     ConfigError: the machine has none: `VmmConfig(balloon=Balloon())`.
    #[getter]
    fn balloon<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyBalloonDevice>> {
        virtio::only::<Balloon>(slf.get(), "balloon", "VmmConfig(balloon=Balloon()) adds one")?;
        let make = || Bound::new(slf.py(), PyBalloonDevice(slf.clone().unbind()));
        slf.get().parts.get_or_make(slf.py(), Part::Balloon, make)
    }
}
