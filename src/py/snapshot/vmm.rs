//! `Vmm` for Python, continued: `snapshot` and `reset`.

use pyo3::prelude::*;

use super::object::PySnapshot;
use crate::hop::hop;
use crate::py::vmm::PyVmm;

#[pymethods]
impl PyVmm {
    /// Capture everything that a guest can see of this machine: vCPUs, memory, devices, clock.
    ///
    /// The result can be forked, saved, and reset to.
    ///
    /// A running machine is paused meanwhile. Memory is not copied: the machine continues with
    /// private copies of the pages that it writes from now on. If the guest has ended, the snapshot
    /// continues after the instruction that ended it.
    ///
    /// Raises:
    ///     StateError: the machine is closed, a device cannot be saved, memory is shared with
    ///         others, or another thread resumed the machine meanwhile.
    fn snapshot(&self, py: Python<'_>) -> PyResult<PySnapshot> {
        hop!();
        let vmm = self.vmm()?;
        let core = py.detach(|| vmm.snapshot()).map_err(|e| self.device_failure(e.into()))?;
        Ok(PySnapshot::of(core, self.origin()?.config.clone_ref(py)))
    }

    /// Restore the state of a snapshot in place. Return the number of memory pages that changed.
    ///
    /// If the guest has ended, the machine can be run again. If it is running, it continues from
    /// the snapshot. Output that was not collected is dropped.
    ///
    /// Raises:
    ///     StateError: the machine is closed, its run is ending, or the snapshot has another shape,
    ///         device or CPUID.
    fn reset(&self, py: Python<'_>, snapshot: &PySnapshot) -> PyResult<u64> {
        let (vmm, snapshot) = (self.core()?, snapshot.core()?);
        let changed = py.detach(|| vmm.reset(snapshot));
        changed.map_err(|e| self.device_failure(e.into()))
    }
}
