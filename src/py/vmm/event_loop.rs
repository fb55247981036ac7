//! The event loop of a `Vmm` for Python: its event manager, exit handler and subscribers.

use pyo3::prelude::*;

use super::object::PyVmm;
use crate::py::event::{PyEventManager, PySubscriberId, PyWrappedExitHandler};

#[pymethods]
impl PyVmm {
    /// The event manager whose loop runs inside `run`.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed. A manager obtained earlier stays usable.
    #[getter]
    fn event_manager(&self, py: Python<'_>) -> PyResult<Py<PyEventManager>> {
        self.tracker.hand_out();
        self.manager(py)
    }

    /// The handler that ends a run.
    ///
    /// Raises:
    ///     ClosedError: the machine is closed.
    #[getter]
    fn exit_handler(&self, py: Python<'_>) -> PyResult<Py<PyWrappedExitHandler>> {
        self.tracker.hand_out();
        self.loop_objects(py, |own| own.exit_handler.clone_ref(py))
    }

    /// Register a subscriber with the machine's event manager; see `EventManager.add_subscriber`.
    fn add_subscriber(&self, subscriber: &Bound<'_, PyAny>) -> PyResult<PySubscriberId> {
        self.tracker.hand_out();
        let manager = self.manager(subscriber.py())?;
        PyEventManager::add_subscriber(manager.bind(subscriber.py()), subscriber)
    }

    /// Unregister a subscriber and return it; see `EventManager.remove_subscriber`.
    fn remove_subscriber(&self, py: Python<'_>, id: &PySubscriberId) -> PyResult<Py<PyAny>> {
        self.tracker.hand_out();
        self.manager(py)?.get().remove_subscriber(py, id)
    }
}
