//! What a `Vmm` for Python has in the event loop that its runs turn, until it is closed. With the
//! GIL held.

use pyo3::prelude::*;

use super::event_manager::PyEventManager;
use super::events::PySubscriberId;
use super::exit_handler::PyWrappedExitHandler;
use super::vmm::PyVmm;
use crate::vmm::closed;

/// What a machine has in the event loop that its runs turn.
#[derive(Debug)]
pub(super) struct InLoop {
    pub(super) event_manager: Py<PyEventManager>,
    pub(super) exit_handler: Py<PyWrappedExitHandler>,
}

impl InLoop {
    pub(super) fn clone_ref(&self, py: Python<'_>) -> Self {
        let Self { event_manager, exit_handler } = self;
        Self {
            event_manager: event_manager.clone_ref(py),
            exit_handler: exit_handler.clone_ref(py),
        }
    }
}

impl PyVmm {
    fn own<T>(&self, py: Python<'_>, of: impl FnOnce(&InLoop) -> T) -> PyResult<T> {
        let found = self.in_loop.with(py, |own| own.as_ref().map(of));
        found.ok_or_else(|| closed().into())
    }

    /// The event manager whose loop `run` turns.
    pub(super) fn manager(&self, py: Python<'_>) -> PyResult<Py<PyEventManager>> {
        self.own(py, |own| own.event_manager.clone_ref(py))
    }
}

#[pymethods]
impl PyVmm {
    /// The event manager whose loop `run` turns.
    ///
    /// Raises:
    ///     StateError: the machine is closed.
    #[getter]
    fn event_manager(&self, py: Python<'_>) -> PyResult<Py<PyEventManager>> {
        self.tie.hand_out();
        self.manager(py)
    }

    /// The handler that ends a run.
    ///
    /// Raises:
    ///     StateError: the machine is closed.
    #[getter]
    fn exit_handler(&self, py: Python<'_>) -> PyResult<Py<PyWrappedExitHandler>> {
        self.tie.hand_out();
        self.own(py, |own| own.exit_handler.clone_ref(py))
    }

    /// Register a subscriber with the machine's event manager; see `EventManager.add_subscriber`.
    fn add_subscriber(&self, subscriber: &Bound<'_, PyAny>) -> PyResult<PySubscriberId> {
        self.tie.hand_out();
        let manager = self.manager(subscriber.py())?;
        PyEventManager::add_subscriber(manager.bind(subscriber.py()), subscriber)
    }

    /// Unregister a subscriber and return it; see `EventManager.remove_subscriber`.
    fn remove_subscriber(&self, py: Python<'_>, id: &PySubscriberId) -> PyResult<Py<PyAny>> {
        self.tie.hand_out();
        self.manager(py)?.get().remove_subscriber(py, id)
    }
}
