//! `Vmm` for Python: how it is closed, by a call, the end of a `with`, or its last reference.

use std::sync::Arc;

use pyo3::prelude::*;

use super::object::PyVmm;
use crate::py::ending::import;
use crate::py::enter::attach;
use crate::py::interrupt;
use crate::vcpu::VmRunState;
use crate::vmm::Vmm;

/// Close a machine, however long its callbacks take; a signal handler that raises ends the wait.
pub(in crate::py) fn close(py: Python<'_>, vmm: &Arc<Vmm>) -> PyResult<()> {
    if py.detach(|| vmm.close_without_wait()) {
        return Ok(());
    }
    let vmm = Arc::clone(vmm);
    interrupt::waiting(py, move || vmm.close())
}

impl PyVmm {
    /// If the machine is closed, drop its devices, and the subscribers of its streams, which a
    /// shared loop would keep. Returns whether it is closed.
    pub(in crate::py) fn release_if_closed(&self, py: Python<'_>, vmm: &Vmm) -> bool {
        let is_closed = vmm.state() == VmRunState::Closed;
        if is_closed {
            self.release_objects(py);
        }
        is_closed
    }

    /// After a run: if a callback has closed the machine and another one is still in progress,
    /// close the machine now. `waits` for that, as [`close`] does; otherwise it happens in the
    /// background. Then [`Self::release_if_closed`].
    pub(in crate::py) fn close_if_due(&self, py: Python<'_>, waits: bool) -> PyResult<()> {
        let vmm = self.core()?;
        if vmm.is_close_due() {
            if waits {
                close(py, vmm)?;
            } else {
                let vmm = Arc::clone(vmm);
                interrupt::in_background(py, move || vmm.close());
            }
        }
        self.release_if_closed(py, vmm);
        Ok(())
    }

    /// Drop the virtio devices in Python.
    pub(super) fn release_programs(&self) {
        let programs = std::mem::take(&mut *self.programs.lock());
        let objects: Vec<_> = programs.iter().map(|program| program.release()).collect();
        drop(objects);
    }

    fn release_objects(&self, py: Python<'_>) {
        // Outside the locks, because this may run Python code.
        let devices = std::mem::take(&mut *self.devices.lock());
        drop(devices);
        self.release_programs();
        let streams = std::mem::take(&mut *self.streams.lock());
        let Some(own) = self.loop_objects.with(py, Option::take) else { return };
        for id in streams {
            // Fails if the program has already removed it.
            let _ = own.event_manager.get().remove_subscriber(py, id.get());
        }
    }
}

impl Drop for PyVmm {
    fn drop(&mut self) {
        let Some(vmm) = self.vmm.take() else { return };
        if self.tracker.is_leased() {
            // The next job uses the machine, or the pool closes it.
            return attach(|py| py.detach(|| drop(vmm)));
        }
        // Its devices and hooks may hold parts of it, so it is closed explicitly. That may sleep in
        // the kernel, and its threads may need the GIL to end.
        attach(|py| {
            // A close that a signal has interrupted continues in the background.
            if !vmm.is_closing()
                && let Err(error) = close(py, &vmm)
            {
                error.write_unraisable(py, None);
            }
            py.detach(|| drop(vmm));
            self.release_objects(py);
            self.hooks.pending.report(py);
        });
    }
}

#[pymethods]
impl PyVmm {
    /// Stop the guest, wait for the run in progress to end, and release all resources. A second
    /// call does nothing.
    ///
    /// In a callback, it takes effect when the run ends. If a signal handler raises during the
    /// wait, as Ctrl-C's does, the exception is raised here. The machine is still closed, and
    /// another `close` waits for that.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(vmm) = self.vmm.peek() else { return Ok(()) };
        close(py, vmm)?;
        // Called from a callback, the machine closes at the end of the run, because its last output
        // has not been taken yet.
        if self.release_if_closed(py, vmm) {
            self.hooks.pending.report(py);
        }
        Ok(())
    }

    fn __aenter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pyvmm.aio")?.call_method1("entered", (slf,))
    }

    #[pyo3(
        signature = (_kind, _error, _traceback, /),
        text_signature = "($self, kind, error, traceback, /)"
    )]
    fn __aexit__<'py>(
        slf: &Bound<'py, Self>,
        _kind: Py<PyAny>,
        _error: Py<PyAny>,
        _traceback: Py<PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pyvmm.aio")?.call_method1("close_vmm", (slf,))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(
        signature = (_kind, _error, _traceback, /),
        text_signature = "($self, kind, error, traceback, /)"
    )]
    fn __exit__(
        slf: &Bound<'_, Self>,
        _kind: Py<PyAny>,
        _error: Py<PyAny>,
        _traceback: Py<PyAny>,
    ) -> PyResult<()> {
        // A subclass may do more to close it.
        slf.call_method0("close").map(drop)
    }
}
