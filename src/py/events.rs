//! `Events`, `EventOps` and `SubscriberId`: what a Python subscriber is given and gives.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use event_manager::{EventSet, Events, SubscriberId};
use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use super::event_manager::PyEventManager;

/// The file descriptor of an int or of an object with `fileno()`.
pub(super) fn descriptor(source: &Bound<'_, PyAny>) -> PyResult<RawFd> {
    // SAFETY: a borrowed reference to a live object, with the GIL held.
    let fd = unsafe { pyo3::ffi::PyObject_AsFileDescriptor(source.as_ptr()) };
    if fd < 0 { Err(PyErr::fetch(source.py())) } else { Ok(fd) }
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
    /// Changed only by `happened_next`, for an object that nobody else holds.
    event_set: AtomicU32,
    fd_and_data: AtomicU64,
    /// Kept alive while it is registered.
    source: Option<Py<PyAny>>,
}

impl PyEvents {
    /// What happened.
    pub(super) fn happened(events: Events) -> Self {
        Self::new_with(events, None)
    }

    fn new_with(events: Events, source: Option<Py<PyAny>>) -> Self {
        let event = events.epoll_event();
        Self {
            event_set: AtomicU32::new(event.events()),
            fd_and_data: AtomicU64::new(event.data()),
            source,
        }
    }

    /// What happened next.
    pub(super) fn happened_next(&self, events: Events) {
        let event = events.epoll_event();
        // Relaxed, here and below: nobody else holds this object while it changes.
        self.event_set.store(event.events(), Ordering::Relaxed);
        self.fd_and_data.store(event.data(), Ordering::Relaxed);
    }

    pub(super) fn events(&self) -> Events {
        // The crate keeps the data above the fd, as it gives both to epoll.
        let packed = self.fd_and_data.load(Ordering::Relaxed);
        let [fd, data] =
            [packed, packed >> 32].map(|half| u32::try_from(half & 0xffff_ffff).unwrap_or(0));
        let set = EventSet::from_bits_truncate(self.event_set.load(Ordering::Relaxed));
        Events::with_data_raw(fd.cast_signed(), data, set)
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
        Ok(Self::new_with(events, Some(source.clone().unbind())))
    }

    /// The file descriptor's number.
    #[getter]
    fn fd(&self) -> RawFd {
        self.events().fd()
    }

    /// The number given at registration.
    #[getter]
    fn data(&self) -> u32 {
        self.events().data()
    }

    /// What to watch for, or what happened.
    #[getter]
    fn event_set<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // A Flag is looked up by its value in Python code: a dict is ten times as quick.
        static KNOWN: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
        static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let bits = self.events().event_set().bits();
        let known = KNOWN.get_or_init(py, || PyDict::new(py).unbind()).bind(py);
        if let Some(set) = known.get_item(bits)? {
            return Ok(set);
        }
        let set = CLASS.import(py, "pyvmm.events", "EventSet")?.call1((bits,))?;
        known.set_item(bits, &set)?;
        Ok(set)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (fd, data) = (self.fd(), self.data());
        Ok(format!("Events(fd={fd}, event_set={}, data={data})", self.event_set(py)?.repr()?))
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

/// Changes what a subscriber watches.
///
/// Usable only during the call it was passed to; later use raises RuntimeError.
#[pyclass(frozen, name = "EventOps", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEventOps {
    /// Set for the batch it serves.
    manager: Mutex<Option<Py<PyEventManager>>>,
    /// The subscriber whose call is in progress, or [`NO_CALL`].
    token: AtomicU64,
}

const NO_CALL: u64 = u64::MAX;

/// Whose registrations an `EventOps` changes.
struct Target {
    manager: Py<PyEventManager>,
    token: u64,
    id: SubscriberId,
}

impl PyEventOps {
    pub(super) fn of(manager: &Bound<'_, PyEventManager>) -> Self {
        let manager = Mutex::new(Some(manager.clone().unbind()));
        Self { manager, token: AtomicU64::new(NO_CALL) }
    }

    /// Serve another batch.
    pub(super) fn attach(&self, manager: &Bound<'_, PyEventManager>) {
        *self.manager.lock() = Some(manager.clone().unbind());
    }

    /// The batch has been delivered: hold the manager no longer.
    pub(super) fn detach(&self) {
        let manager = self.manager.lock().take();
        drop(manager);
    }

    /// The call it is passed to begins.
    pub(super) fn begin(&self, token: u64) {
        // Relaxed, here and below: with the GIL held.
        self.token.store(token, Ordering::Relaxed);
    }

    /// The call it was passed to has ended.
    pub(super) fn end(&self) {
        self.token.store(NO_CALL, Ordering::Relaxed);
    }

    fn target(&self, py: Python<'_>) -> PyResult<Target> {
        let token = self.token.load(Ordering::Relaxed);
        let manager = self.manager.lock().as_ref().map(|manager| manager.clone_ref(py));
        match manager {
            Some(manager) if token != NO_CALL => {
                let id = manager.get().id_of(token)?;
                Ok(Target { manager, token, id })
            }
            _ => Err(PyRuntimeError::new_err(
                "this EventOps is no longer usable: it belongs to the init() or process() call it was passed to",
            )),
        }
    }
}

#[pymethods]
impl PyEventOps {
    /// Watch a file descriptor.
    ///
    /// Raises:
    ///     EventError: it is registered already, closed, or a regular file, which epoll does not watch.
    pub(super) fn add(&self, py: Python<'_>, events: &Bound<'_, PyAny>) -> PyResult<()> {
        let Target { manager, token, id } = self.target(py)?;
        let (manager, events) = (manager.get(), as_events(events)?);
        py.detach(|| manager.core().add(id, events.events()))?;
        manager.keep_source(token, events.events().fd(), events.source(py));
        Ok(())
    }

    /// Watch a file descriptor of this subscriber for other events, or re-arm a one-shot.
    ///
    /// Raises:
    ///     EventError: it is not this subscriber's.
    fn modify(&self, py: Python<'_>, events: &Bound<'_, PyAny>) -> PyResult<()> {
        let Target { manager, id, .. } = self.target(py)?;
        let (manager, events) = (manager.get(), as_events(events)?);
        Ok(py.detach(|| manager.core().modify(id, events.events()))?)
    }

    /// Stop watching a file descriptor of this subscriber. By number or `Events` it may be closed already.
    ///
    /// Raises:
    ///     EventError: it is not this subscriber's.
    pub(super) fn remove(&self, py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<()> {
        let Target { manager, token, id } = self.target(py)?;
        let manager = manager.get();
        let fd = match source.cast::<PyEvents>() {
            Ok(events) => events.get().fd(),
            Err(_) => descriptor(source)?,
        };
        py.detach(|| manager.core().remove(id, fd))?;
        drop(manager.forget_source(token, fd));
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.manager.try_lock().map_or(Ok(()), |manager| visit.call(&*manager))
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
