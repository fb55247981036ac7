//! A vCPU as its Python objects refer to it: usable until the machine is closed.

use std::sync::{Arc, Weak};
use std::time::Duration;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::lease::ReuseTracker;
use super::owned::Owned;
use super::wakeup;
use crate::error::{Error, Result};
use crate::vcpu::{Vcpu, VcpuHandle, with_vcpu_in_callback};

/// A vCPU, usable until its machine is closed.
#[derive(Debug)]
pub(super) struct Processor {
    pub(super) handle: Owned<Weak<VcpuHandle>>,
    /// The machine's object, so that the machine stays open while a vCPU or its registers are
    /// referenced.
    machine: Option<Py<PyAny>>,
    pub(super) tracker: ReuseTracker,
}

impl Processor {
    /// Access the vCPU, with changes that a reset undoes. If another thread uses it for long, as a
    /// snapshot does, this waits without the GIL, and a signal handler that raises ends the wait.
    #[inline]
    pub(super) fn with_vcpu<T: Send>(
        &self,
        py: Python<'_>,
        look: impl FnOnce(&mut Vcpu) -> Result<T> + Send,
    ) -> PyResult<T> {
        // Usually in a callback for this vCPU.
        let try_now = |handle: &VcpuHandle| handle.try_with_vcpu(Duration::ZERO, look);
        let tried = match self.handle.known() {
            // It checks the process itself.
            Some(known) => with_vcpu_in_callback(known, try_now),
            None => Err(try_now),
        };
        match tried {
            Ok(Ok(result)) => Ok(result?),
            Ok(tried) => self.with_vcpu_waiting(py, tried),
            Err(try_now) => self.with_vcpu_waiting(py, try_now(&*self.upgrade()?)),
        }
    }

    fn with_vcpu_waiting<T: Send, F>(
        &self,
        py: Python<'_>,
        mut tried: std::result::Result<Result<T>, F>,
    ) -> PyResult<T>
    where
        F: FnOnce(&mut Vcpu) -> Result<T> + Send,
    {
        let handle = self.upgrade()?;
        loop {
            let look = match tried {
                Ok(result) => return Ok(result?),
                Err(look) => look,
            };
            py.check_signals()?;
            tried = py.detach(|| handle.try_with_vcpu(wakeup::SIGNAL_CHECK_INTERVAL, look));
        }
    }

    /// Access the vCPU, with changes that a reset cannot undo.
    pub(super) fn change<T: Send>(
        &self,
        py: Python<'_>,
        change: impl FnOnce(&mut Vcpu) -> Result<T> + Send,
    ) -> PyResult<T> {
        self.tracker.change();
        self.with_vcpu(py, change)
    }

    /// The vCPU, to run it directly.
    pub(super) fn handle(&self) -> Result<Arc<VcpuHandle>> {
        self.tracker.hand_out();
        self.upgrade()
    }

    fn upgrade(&self) -> Result<Arc<VcpuHandle>> {
        self.handle.get()?.upgrade().ok_or_else(|| Error::closed("machine"))
    }

    pub(super) fn of(
        handle: Weak<VcpuHandle>,
        machine: Option<Py<PyAny>>,
        tracker: &ReuseTracker,
    ) -> Self {
        Self { handle: Owned::new("vCPU", handle), machine, tracker: tracker.clone() }
    }

    pub(super) fn another(&self, py: Python<'_>) -> Result<Self> {
        let machine = self.machine.as_ref().map(|machine| machine.clone_ref(py));
        Ok(Self::of(Weak::clone(self.handle.get()?), machine, &self.tracker))
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.machine)
    }
}
