//! `Events`, `EventOps` and `SubscriberId`: what a Python subscriber is given and gives.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventSet, Events, SubscriberId};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use super::event_manager::PyEventManager;

/// The file descriptor of an int or of an object with `fileno()`.
pub(super) fn descriptor(source: &Bound<'_, PyAny>) -> PyResult<RawFd> {
    // SAFETY: a borrowed reference to a live object, with the GIL held.
    let fd = unsafe { pyo3::ffi::PyObject_AsFileDescriptor(source.as_ptr()) };
    if fd < 0 {
        Err(PyErr::fetch(source.py()))
    } else {
        Ok(fd)
    }
}

/// Events of a file descriptor: what to watch it for, or what happened there.
///
/// Args:
///     source: an int, or an object with `fileno()`; it is kept alive while it is registered.
///     event_set: what to watch for.
///     data: a number from 0 to 2^32 - 1 that comes back with each event.
///
/// Raises:
///     ValueError: the source is closed, or a flag has no meaning.
#[pyclass(frozen, name = "Events", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEvents {
    events: Events,
    /// Kept alive while it is registered.
    source: Option<Py<PyAny>>,
}

impl PyEvents {
    /// What happened.
    pub(super) fn happened(events: Events) -> Self {
        Self {
            events,
            source: None,
        }
    }

    pub(super) fn events(&self) -> Events {
        self.events
    }

    pub(super) fn source(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.source.as_ref().map(|source| source.clone_ref(py))
    }
}

#[pymethods]
impl PyEvents {
    #[new]
    #[pyo3(signature = (source, event_set = EventSet::IN.bits(), data = 0))]
    fn new(source: &Bound<'_, PyAny>, event_set: u32, data: u32) -> PyResult<Self> {
        let fd = descriptor(source)?;
        let set = EventSet::from_bits(event_set).ok_or_else(|| {
            PyValueError::new_err(format!("{event_set:#x} has no meaning to epoll"))
        })?;
        let events = Events::with_data_raw(fd, data, set);
        Ok(Self {
            events,
            source: Some(source.clone().unbind()),
        })
    }

    /// The file descriptor's number.
    #[getter]
    fn fd(&self) -> RawFd {
        self.events.fd()
    }

    /// The number given at registration.
    #[getter]
    fn data(&self) -> u32 {
        self.events.data()
    }

    /// What to watch for, or what happened.
    #[getter]
    fn event_set<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let class = CLASS.import(py, "pyvmm.events", "EventSet")?;
        class.call1((self.events.event_set().bits(),))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (fd, data) = (self.fd(), self.data());
        Ok(format!(
            "Events(fd={fd}, event_set={}, data={data})",
            self.event_set(py)?.repr()?
        ))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.source)
    }
}

/// Names a subscriber of one event manager. Hashable.
#[pyclass(frozen, eq, hash, name = "SubscriberId", module = "pyvmm")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PySubscriberId {
    /// Tells the ids of different managers apart.
    pub(super) manager: u64,
    pub(super) token: u64,
}

#[pymethods]
impl PySubscriberId {
    fn __repr__(&self) -> String {
        format!("SubscriberId({})", self.token)
    }
}

/// Changes what a subscriber watches. Usable only during the call it was passed to; later use raises RuntimeError.
#[pyclass(frozen, name = "EventOps", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEventOps {
    manager: Py<PyEventManager>,
    token: u64,
    id: SubscriberId,
    is_live: AtomicBool,
}

impl PyEventOps {
    pub(super) fn new(manager: Py<PyEventManager>, token: u64, id: SubscriberId) -> Self {
        Self {
            manager,
            token,
            id,
            is_live: AtomicBool::new(true),
        }
    }

    /// The call it was passed to has ended.
    pub(super) fn end(&self) {
        // Relaxed: written and read with the GIL held.
        self.is_live.store(false, Ordering::Relaxed);
    }

    fn manager(&self) -> PyResult<&PyEventManager> {
        if self.is_live.load(Ordering::Relaxed) {
            return Ok(self.manager.get());
        }
        Err(PyRuntimeError::new_err(
            "this EventOps is no longer usable: it belongs to the init() or process() call it was passed to",
        ))
    }
}

#[pymethods]
impl PyEventOps {
    /// Watch a file descriptor.
    ///
    /// Raises:
    ///     EventError: it is registered already, closed, or a regular file, which epoll does not watch.
    pub(super) fn add(&self, py: Python<'_>, events: &Bound<'_, PyAny>) -> PyResult<()> {
        let manager = self.manager()?;
        let events = as_events(events)?;
        py.detach(|| manager.core().add(self.id, events.events()))?;
        manager.keep_source(self.token, events.events().fd(), events.source(py));
        Ok(())
    }

    /// Watch a file descriptor of this subscriber for other events, or re-arm a one-shot.
    ///
    /// Raises:
    ///     EventError: it is not this subscriber's.
    fn modify(&self, py: Python<'_>, events: &Bound<'_, PyAny>) -> PyResult<()> {
        let manager = self.manager()?;
        let events = as_events(events)?;
        Ok(py.detach(|| manager.core().modify(self.id, events.events()))?)
    }

    /// Stop watching a file descriptor of this subscriber. By number or `Events` it may be closed already.
    ///
    /// Raises:
    ///     EventError: it is not this subscriber's.
    pub(super) fn remove(&self, py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<()> {
        let manager = self.manager()?;
        let fd = match source.cast::<PyEvents>() {
            Ok(events) => events.get().fd(),
            Err(_) => descriptor(source)?,
        };
        py.detach(|| manager.core().remove(self.id, fd))?;
        drop(manager.forget_source(self.token, fd));
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.manager)
    }
}

fn as_events<'a>(object: &'a Bound<'_, PyAny>) -> PyResult<&'a PyEvents> {
    match object.cast::<PyEvents>() {
        Ok(events) => Ok(events.get()),
        Err(_) => Err(PyTypeError::new_err(format!(
            "Events(source, event_set) is needed here, not {}",
            object.get_type().name()?
        ))),
    }
}
