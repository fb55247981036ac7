//! The objects of a `Vmm` for Python in its event loop, until it is closed. Used with the GIL held.

use pyo3::prelude::*;

use crate::py::event::{PyEventManager, PyWrappedExitHandler};

/// The objects of a machine in its event loop.
#[derive(Debug)]
pub(in crate::py) struct LoopObjects {
    pub(in crate::py) event_manager: Py<PyEventManager>,
    pub(in crate::py) exit_handler: Py<PyWrappedExitHandler>,
}

impl LoopObjects {
    pub(in crate::py) fn clone_ref(&self, py: Python<'_>) -> Self {
        let Self { event_manager, exit_handler } = self;
        Self {
            event_manager: event_manager.clone_ref(py),
            exit_handler: exit_handler.clone_ref(py),
        }
    }
}
