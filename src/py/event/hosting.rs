//! An event manager inside a running asyncio loop: `EventManager.run_async`.

use pyo3::prelude::*;

use super::manager::PyEventManager;
use crate::py::ending::import;

#[pymethods]
impl PyEventManager {
    /// `run_forever` inside a running asyncio loop, which stays responsive.
    ///
    /// A subscriber's `process` may be a coroutine function: it runs as a task, and its exception
    /// ends the run. Coroutines that still run after `stop` have a second to come to their end;
    /// those that do not are cancelled, and the asyncio loop's exception handler is told which.
    ///
    /// Raises:
    ///     StateError: the manager is hosted or in a run already. Exception: the first exception of
    ///     a callback or a coroutine. The others are in its notes and go to the asyncio
    ///         loop's exception handler.
    fn run_async<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().check()?;
        import(slf.py(), "pyvmm.aio")?.call_method1("run_manager", (slf,))
    }

    fn _begin_hosting(&self, awaiter: Py<PyAny>) -> PyResult<()> {
        self.core().check_process()?;
        self.owners().host(awaiter)
    }

    fn _end_hosting(&self) {
        self.owners().end_hosting();
    }
}
