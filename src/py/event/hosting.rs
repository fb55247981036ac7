//! An event manager inside a running asyncio loop: `EventManager.run_async`.

use pyo3::prelude::*;

use super::manager::PyEventManager;
use crate::py::ending::import;

#[pymethods]
impl PyEventManager {
    /// Run the loop like `run_forever`, hosted by the running asyncio loop, which stays responsive.
    ///
    /// A subscriber's `process` may be a coroutine function: it runs as a task, and its exception
    /// ends the run. After `stop`, running coroutines have one second to finish. Then they are
    /// cancelled, and their names are passed to the asyncio loop's exception handler.
    ///
    /// Raises:
    ///     StateError: the manager already has a host, or is already in a run.
    ///     Exception: the first exception of a callback or a coroutine. Further ones are added to
    ///         its notes and passed to the asyncio loop's exception handler.
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
