//! `Vmm` for Python, continued: `snapshot` and `reset`.

use pyo3::prelude::*;

use super::object::PyVmm;
use crate::hop::hop;
use crate::py::interrupt;
use crate::py::snapshot::PySnapshot;

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
    ///     WaitTimeoutError: a callback of the machine did not return within `timeout` seconds. The
    ///         machine is as before.
    #[pyo3(signature = (timeout = None))]
    fn snapshot(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<PySnapshot> {
        hop!();
        let vmm = self.vmm()?;
        let core = interrupt::limited(py, timeout, |limit| vmm.snapshot(limit));
        let core = core.map_err(|error| self.device_failure(error))?;
        Ok(PySnapshot::of(core, self.origin()?.config.clone_ref(py)))
    }

    /// Restore the state of a snapshot in place. Return the number of memory pages that changed.
    ///
    /// If the guest has ended, the machine can be run again. If it is running, it continues from
    /// the snapshot. Output that was not collected is dropped.
    ///
    /// Raises:
    ///     StateError: the machine is closed, its run is ending, or the snapshot is of a machine
    ///         with other vCPUs, interrupt controllers or devices, or with another CPUID.
    ///     WaitTimeoutError: a callback of the machine did not return within `timeout` seconds. The
    ///         machine is as before.
    #[pyo3(signature = (snapshot, timeout = None))]
    fn reset(&self, py: Python<'_>, snapshot: &PySnapshot, timeout: Option<f64>) -> PyResult<u64> {
        let (vmm, snapshot) = (self.core()?, snapshot.core()?);
        // Dropped with the GIL held.
        let mut stop = None;
        let changed = interrupt::limited(py, timeout, |limit| {
            vmm.reset(snapshot, limit, || stop = self.hooks.pending.take_stop())
        });
        if changed.is_ok() {
            self.hooks.pending.keep_exit(None);
        }
        self.close_if_due(py, changed.is_ok())?;
        changed.map_err(|error| self.device_failure(error))
    }
}
