//! Traces for Python: `Vmm.trace`.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;

use super::ending::import;
use super::vmm::PyVmm;
use crate::sync::{Mutex, rank};
use crate::trace::Trace;

/// A trace of a machine, written inside `with vmm.trace(path): ...`. Created by `Vmm.trace`.
#[pyclass(frozen, name = "Trace", module = "pyvmm")]
#[derive(Debug)]
pub struct PyTrace {
    vmm: Py<PyVmm>,
    /// The file.
    #[pyo3(get)]
    path: PathBuf,
    current: Mutex<Option<Arc<Trace>>, rank::TraceObject>,
}

#[pymethods]
impl PyTrace {
    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let this = slf.get();
        let vmm = this.vmm.get().vmm()?;
        slf.py().detach(|| -> PyResult<()> {
            let trace = vmm.start_trace(&this.path)?;
            *this.current.lock() = Some(trace);
            Ok(())
        })?;
        Ok(slf.clone())
    }

    #[pyo3(
        signature = (_kind, error, _traceback, /),
        text_signature = "($self, kind, error, traceback, /)"
    )]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        // A forked child leaves the block that its parent has entered.
        let Ok(vmm) = self.vmm.get().vmm() else { return Ok(()) };
        let ended = py.detach(|| {
            let current = self.current.lock().take();
            current.map_or(Ok(()), |trace| vmm.instruments().end_trace(&trace))
        });
        match ended {
            // The caller should see the exception of the block.
            Err(failure) if !error.is_none() => {
                let text = format!("the trace is not complete: {failure}");
                error.call_method1(intern!(py, "add_note"), (text,)).map(drop)
            }
            ended => Ok(ended?),
        }
    }

    fn __repr__(&self) -> String {
        format!("Trace({})", self.path.display())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vmm)
    }
}

#[pymethods]
impl PyVmm {
    /// Write a trace with every hop of the machine and its times, for Perfetto: `with
    /// vmm.trace(path): ...`.
    ///
    /// Each thread has a track, with the time inside the guest, exits, calls of devices, events of
    /// the loop, and calls of Python code. If the machine is already running, the trace starts with
    /// each vCPU's next entry and the loop's next iteration.
    ///
    /// Raises, when it is entered or left:
    ///     StateError: another trace of this machine is being written.
    ///     StreamError: the file cannot be created or written; this does not end a run.
    fn trace(slf: Bound<'_, Self>, path: PathBuf) -> PyResult<PyTrace> {
        slf.get().vmm()?;
        // It names callbacks, so it must not be imported between two of them.
        import(slf.py(), "pyvmm.callbacks")?;
        Ok(PyTrace { vmm: slf.unbind(), path, current: Mutex::default() })
    }
}
