//! `Events`, `EventOps` and `SubscriberId`: the objects that Python subscribers use.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use event_manager::{EventSet, Events, SubscriberId};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use super::event_fd::PyEventFd;
use super::manager::PyEventManager;
use super::private_numbers::give_out;
use super::queue::Drain;
use super::subscribers::RegisteredSource;
use super::timer_fd::PyTimerFd;
use crate::py::descriptor::descriptor;
use crate::py::ending::guard_thread;

/// Events of a file descriptor: what to watch for, or what happened.
///
/// Args:
///     source: an int, or an object with `fileno()`; the object is kept alive while it is
///         registered.
///     event_set: what to watch for.
///     data: a number from 0 to 2^32 - 1 that is passed back with each event.
///     drain: read the source, a nonblocking `EventFd` or a `TimerFd`, before each call of the
///         subscriber, and pass the result in `count`. The source stays open while it is
///         registered.
///
/// Raises:
///     ValueError: the source is closed, or a flag has no meaning.
///     TypeError: `drain` is set and the source cannot be drained.
#[pyclass(frozen, name = "Events", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEvents {
    /// Changed only by `happened_next`, for an object without other references.
    event_set: AtomicU32,
    fd_and_data: AtomicU64,
    /// Kept alive while it is registered.
    source: Option<Py<PyAny>>,
    drain: Option<Arc<dyn Drain>>,
    /// The count of a drained source, or [`NOT_DRAINED`], which no eventfd or timer reaches.
    count: AtomicU64,
}

const NOT_DRAINED: u64 = u64::MAX;

impl PyEvents {
    /// An object for an event.
    pub(crate) fn happened(events: Events) -> Self {
        Self::new_with(events, None, None)
    }

    fn new_with(events: Events, source: Option<Py<PyAny>>, drain: Option<Arc<dyn Drain>>) -> Self {
        let event = events.epoll_event();
        Self {
            event_set: AtomicU32::new(event.events()),
            fd_and_data: AtomicU64::new(event.data()),
            source,
            drain,
            count: AtomicU64::new(NOT_DRAINED),
        }
    }

    /// Reuse the object for the next event.
    pub(crate) fn happened_next(&self, events: Events, count: Option<u64>) {
        let event = events.epoll_event();
        // Relaxed, here and below: there is no other reference to this object while it changes.
        self.event_set.store(event.events(), Ordering::Relaxed);
        self.fd_and_data.store(event.data(), Ordering::Relaxed);
        self.count.store(count.unwrap_or(NOT_DRAINED), Ordering::Relaxed);
    }

    pub(crate) fn events(&self) -> Events {
        // The crate passes both to epoll, with the data in the bits above the fd.
        let packed = self.fd_and_data.load(Ordering::Relaxed);
        let [fd, data] =
            [packed, packed >> 32].map(|half| u32::try_from(half & 0xffff_ffff).unwrap_or(0));
        let set = EventSet::from_bits_truncate(self.event_set.load(Ordering::Relaxed));
        Events::with_data_raw(fd.cast_signed(), data, set)
    }

    fn registered_source(&self, py: Python<'_>) -> RegisteredSource {
        RegisteredSource {
            object: self.source.as_ref().map(|source| source.clone_ref(py)),
            drain: self.drain.clone(),
        }
    }
}

#[pymethods]
impl PyEvents {
    #[new]
    #[pyo3(
        signature = (source, event_set = EventSet::IN.bits(), data = 0, *, drain = false),
        text_signature = "(source, event_set=1, data=0, *, drain=False)"
    )]
    fn new(source: &Bound<'_, PyAny>, event_set: u32, data: u32, drain: bool) -> PyResult<Self> {
        let fd = number_of(source)?;
        let set = EventSet::from_bits(event_set).ok_or_else(|| {
            PyValueError::new_err(format!("{event_set:#x} has no meaning to epoll"))
        })?;
        let events = Events::with_data_raw(fd, data, set);
        let drain = if drain { Some(as_drain(source)?) } else { None };
        Ok(Self::new_with(events, Some(source.clone().unbind()), drain))
    }

    /// With `drain`, the number that was read: an eventfd's count or a timer's expirations.
    /// Otherwise None.
    #[getter]
    fn count(&self) -> Option<u64> {
        Some(self.count.load(Ordering::Relaxed)).filter(|count| *count != NOT_DRAINED)
    }

    /// The file descriptor's number.
    #[getter]
    fn fd(&self) -> RawFd {
        give_out(self.events().fd())
    }

    /// The number given at registration.
    #[getter]
    fn data(&self) -> u32 {
        self.events().data()
    }

    /// What to watch for, or what happened.
    #[getter]
    fn event_set<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        // Python looks a Flag up by its value in Python code. A dict is ten times as fast.
        static KNOWN: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
        static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        guard_thread();
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

/// Identifies a subscriber of one event manager. Hashable.
#[pyclass(frozen, eq, hash, name = "SubscriberId", module = "pyvmm")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PySubscriberId {
    /// Distinguishes the ids of different managers.
    pub(crate) manager: u64,
    pub(crate) token: u64,
}

#[pymethods]
impl PySubscriberId {
    fn __repr__(&self) -> String {
        format!("SubscriberId({})", self.token)
    }
}

/// Changes the file descriptors that a subscriber watches.
///
/// An EventOps passed to `init` or `process` is usable only during that call; later use raises
/// RuntimeError. One from `EventManager.event_ops` is usable as long as its subscriber is
/// registered.
#[pyclass(frozen, name = "EventOps", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEventOps {
    /// The manager whose call is in progress, or null. Its caller holds the manager through the
    /// call.
    manager: AtomicPtr<ffi::PyObject>,
    /// The subscriber that is called.
    token: AtomicU64,
    /// The manager of an `EventOps` that belongs to no call.
    own: Option<Py<PyEventManager>>,
}

/// A call that an `EventOps` is passed to. The `EventOps` is usable while this lives.
pub(crate) struct OpsCall<'a>(&'a PyEventOps);

impl Drop for OpsCall<'_> {
    fn drop(&mut self) {
        self.0.manager.store(std::ptr::null_mut(), Ordering::Relaxed);
    }
}

/// The manager and the subscriber whose registrations an `EventOps` changes.
struct Target {
    manager: Py<PyEventManager>,
    token: u64,
    id: SubscriberId,
}

impl PyEventOps {
    pub(crate) fn new() -> Self {
        Self { manager: AtomicPtr::default(), token: AtomicU64::default(), own: None }
    }

    /// An `EventOps` that belongs to no call.
    pub(crate) fn lasting(manager: Py<PyEventManager>, token: u64) -> Self {
        Self { manager: AtomicPtr::default(), token: AtomicU64::new(token), own: Some(manager) }
    }

    /// Begin the call that the `EventOps` is passed to.
    pub(crate) fn begin<'a>(
        &'a self,
        manager: &'a Bound<'_, PyEventManager>,
        token: u64,
    ) -> OpsCall<'a> {
        // Relaxed, here and where it ends: with the GIL held.
        self.token.store(token, Ordering::Relaxed);
        self.manager.store(manager.as_ptr(), Ordering::Relaxed);
        OpsCall(self)
    }

    fn target(&self, py: Python<'_>) -> PyResult<Target> {
        let manager = self.manager.load(Ordering::Relaxed);
        // SAFETY: null, or a manager that `begin` was given and that its caller holds until the
        // call has ended: the call sets null when it ends, with the GIL held, which we hold here.
        let called = unsafe { Bound::from_borrowed_ptr_or_opt(py, manager) };
        let called = called.map(Bound::cast_into::<PyEventManager>).transpose()?;
        match called.or_else(|| self.own.as_ref().map(|own| own.bind(py).clone())) {
            Some(manager) => {
                manager.get().check()?;
                let manager = manager.unbind();
                let token = self.token.load(Ordering::Relaxed);
                let id = manager.get().subscribers().known_id(py, token)?;
                Ok(Target { manager, token, id })
            }
            None => Err(PyRuntimeError::new_err(
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
    ///     EventError: it is already registered, it is closed, or it is a regular file, which epoll
    ///         does not support.
    pub(crate) fn add(&self, py: Python<'_>, events: &Bound<'_, PyAny>) -> PyResult<()> {
        let Target { manager, token, id } = self.target(py)?;
        let (manager, events) = (manager.get(), as_events(events)?);
        py.detach(|| manager.core().add(id, events.events()))?;
        let (fd, source) = (events.events().fd(), events.registered_source(py));
        manager.subscribers().keep_source(py, token, fd, source);
        Ok(())
    }

    /// Watch a file descriptor of this subscriber for other events, or re-arm a one-shot
    /// registration.
    ///
    /// Raises:
    ///     EventError: this subscriber does not watch it.
    fn modify(&self, py: Python<'_>, events: &Bound<'_, PyAny>) -> PyResult<()> {
        let Target { manager, token, id } = self.target(py)?;
        let (manager, events) = (manager.get(), as_events(events)?);
        py.detach(|| manager.core().modify(id, events.events()))?;
        let (fd, source) = (events.events().fd(), events.registered_source(py));
        manager.subscribers().keep_source(py, token, fd, source);
        Ok(())
    }

    /// Stop watching a file descriptor of this subscriber.
    ///
    /// If it is given by number or `Events`, it may already be closed.
    ///
    /// Raises:
    ///     EventError: this subscriber does not watch it.
    pub(crate) fn remove(&self, py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<()> {
        let Target { manager, token, id } = self.target(py)?;
        let manager = manager.get();
        let fd = match source.cast::<PyEvents>() {
            Ok(events) => events.get().events().fd(),
            Err(_) => number_of(source)?,
        };
        py.detach(|| manager.core().remove(id, fd))?;
        manager.subscribers().forget_source(py, token, fd);
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.own)
    }
}

/// The number of a source. It stays private if the source is an `EventFd` or a `TimerFd`.
fn number_of(source: &Bound<'_, PyAny>) -> PyResult<RawFd> {
    let own = match (source.cast::<PyEventFd>(), source.cast::<PyTimerFd>()) {
        (Ok(fd), _) => fd.get().number(source.py()),
        (_, Ok(timer)) => timer.get().number(),
        _ => None,
    };
    // A closed source raises there.
    own.map_or_else(|| descriptor(source), Ok)
}

fn as_drain(source: &Bound<'_, PyAny>) -> PyResult<Arc<dyn Drain>> {
    if let Ok(fd) = source.cast::<PyEventFd>() {
        return fd.get().as_drain(source.py());
    }
    match source.cast::<PyTimerFd>() {
        Ok(timer) => Ok(timer.get().open()?),
        Err(_) => Err(PyTypeError::new_err(format!(
            "an EventFd or a TimerFd can be drained, not {}",
            source.get_type().name()?
        ))),
    }
}

fn as_events<'a>(object: &'a Bound<'_, PyAny>) -> PyResult<&'a PyEvents> {
    match object.cast::<PyEvents>() {
        Ok(events) => Ok(events.get()),
        Err(_) => Err(PyTypeError::new_err(format!(
            "expected Events(source, event_set), not {}",
            object.get_type().name()?
        ))),
    }
}
