//! `Vmm` for the pool of `pyvmm.snapshots`: a machine that is used by one job after another. Used
//! with the GIL held.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::object::{Origin, PyVmm};
use crate::error::ErrorKind;
use crate::limit::Limit;
use crate::py::ending::import;
use crate::py::gil_cell::GilCell;
use crate::py::lease::Lease;
use crate::py::owned::Owned;
use crate::py::parts::Parts;
use crate::py::snapshot::PySnapshot;
use crate::sync::Mutex;

impl PyVmm {
    /// Another object for the same machine.
    fn handle(&self, py: Python<'_>, lease: &Lease) -> PyResult<Self> {
        let (tracker, Origin { config, is_shared }) =
            (self.tracker.lease_to(lease), self.origin()?);
        Ok(Self {
            vmm: Owned::new("machine", Arc::clone(self.core()?)),
            hooks: Arc::clone(&self.hooks),
            devices: Arc::clone(&self.devices),
            programs: Mutex::default(),
            streams: Mutex::default(),
            origin: Origin { config: config.clone_ref(py), is_shared: *is_shared }.into(),
            loop_objects: GilCell::new(
                self.loop_objects.with(py, |own| own.as_ref().map(|own| own.clone_ref(py))),
            ),
            leased: Mutex::default(),
            parts: Arc::new(Parts::of(&tracker)),
            tracker,
        })
    }
}

#[pymethods]
impl PyVmm {
    /// An object for one job of a pool. This object keeps the machine, and its `_renew` detects
    /// what the job has left behind.
    fn _lend(&self, py: Python<'_>) -> PyResult<Py<Self>> {
        let lease = Lease::default();
        let handle = Py::new(py, self.handle(py, &lease)?)?;
        *self.leased.lock() = Some(lease);
        Ok(handle)
    }

    /// Accept the changes so far as the initial state of each job.
    fn _accept_changes(&self) {
        self.tracker.accept_changes();
    }

    /// Whether its vCPUs run, or a thread is in a call that runs them.
    fn _is_running(&self) -> PyResult<bool> {
        Ok(self.core()?.is_in_run())
    }

    /// Whether a reset undoes all changes of the machine since they were accepted.
    fn _is_clean(&self) -> bool {
        self.tracker.is_clean()
    }

    /// Reset the machine to a snapshot for the next job, equal to a new fork. False if the last job
    /// has left something that a reset cannot undo, or if an object of the job is still referenced.
    /// Then the machine must be closed.
    fn _renew(&self, py: Python<'_>, snapshot: &PySnapshot) -> PyResult<bool> {
        let is_held = self.leased.lock().as_ref().is_some_and(|lease| !lease.is_over());
        if is_held || !self.tracker.is_clean() || self.hooks.pending.is_pending() {
            return Ok(false);
        }
        let (vmm, snapshot) = (self.core()?, snapshot.core()?);
        // A callback of the last job that is still in progress is not waited for.
        let renew = || vmm.renew(snapshot, &Limit::new(Some(Duration::ZERO), &|| Ok(())));
        let renewed = match py.detach(renew) {
            Err(error) if error.kind == ErrorKind::Timeout => Ok(false),
            renewed => renewed,
        };
        self.hooks.pending.keep_exit(None);
        self.close_if_due(py, true)?;
        let is_renewed = renewed.map_err(|e| self.device_failure(e.into()))?;
        if !self.origin()?.is_shared {
            self.manager(py)?.get().forget_counts();
        }
        // A device's `restore` may have done something to the machine, and a callback of the last
        // job may have returned meanwhile.
        Ok(is_renewed && self.tracker.is_clean() && !self.hooks.pending.is_pending())
    }

    /// Write randomness to the guest, by the callable, or at an address and of a length.
    fn _write_entropy(slf: &Bound<'_, Self>, entropy: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = slf.py();
        if entropy.is_callable() {
            return entropy.call1((slf,)).map(drop);
        }
        let (address, count): (u64, usize) = entropy.extract()?;
        let random = import(py, "os")?.call_method1("urandom", (count,))?.cast_into::<PyBytes>()?;
        Ok(slf.get().core()?.memory()?.write(address, random.as_bytes())?)
    }
}
