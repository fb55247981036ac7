//! The objects of a `Vmm` for Python in its event loop, until it is closed. Used with the GIL held.

use pyo3::prelude::*;

use super::event::{PyEventManager, PyWrappedExitHandler};

/// The objects of a machine in its event loop.
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
