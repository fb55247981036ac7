//! `EventManager` for Python: the crate's manager, the Python objects subscribed to it, and the
//! queue between them. A dispatch only queues what is for Python; `callback::deliver` calls the
//! objects after it.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event_manager::EventSet;
use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::batch::{Collector, Fetched, Ready};
use super::callback::{self, Delivery};
use super::context::Context;
use super::ending::{self, import};
use super::endpoint::{Call, PyRemoteEndpoint};
use super::events::{PyEventOps, PySubscriberId};
use super::exit_handler::as_native_subscriber;
use super::lead::Lead;
use super::subscribers::{Receiver, Subscribers};
use super::timers::Timers;
use super::turning::Turners;
use super::watch::{Pace, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Calls, EventManager};
use crate::sync::{Mutex, rank};
use crate::trace;

/// Subscribers, and the loop that dispatches events to them by file descriptor.
///
/// One thread at a time turns the loop; any thread may add and remove subscribers meanwhile. It
/// needs no machine and no /dev/kvm.
#[pyclass(frozen, weakref, name = "EventManager", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEventManager {
    core: Arc<EventManager>,
    /// What the last dispatch fetched for Python.
    fetched: Arc<Fetched>,
    delivery: Mutex<Delivery, rank::Delivery>,
    subscribers: Subscribers,
    next_token: AtomicU64,
    /// Tells this manager's ids from another's.
    number: u64,
    turners: Turners,
    lead: Lead,
    /// What other threads ask of the one that turns the loop.
    calls: Calls<Call>,
    watch: Watch,
    timers: Timers,
}

impl PyEventManager {
    pub(super) fn over(core: Arc<EventManager>) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self {
            core,
            fetched: Arc::default(),
            delivery: Mutex::default(),
            subscribers: Subscribers::default(),
            next_token: AtomicU64::new(0),
            // Relaxed, here and below: all that matters is that no number is given twice.
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            turners: Turners::default(),
            lead: Lead::default(),
            calls: Calls::default(),
            watch: Watch::default(),
            timers: Timers::default(),
        }
    }

    pub(super) fn shared_core(&self) -> Arc<EventManager> {
        Arc::clone(&self.core)
    }

    pub(super) fn subscribers(&self) -> &Subscribers {
        &self.subscribers
    }

    /// The subscriber an event is for, if it still wants it.
    pub(super) fn receiver<'py>(
        &self,
        py: Python<'py>,
        ready: &Ready,
    ) -> PyResult<Option<Receiver<'py>>> {
        let hang_up = EventSet::HANG_UP | EventSet::ERROR;
        if ready.events.event_set().intersects(hang_up) && self.drop_closed(py, ready)? {
            return Ok(None);
        }
        self.subscribers.receiver(py, ready, &self.core)
    }

    /// Drop a registration whose number was closed. Says whether it was one.
    fn drop_closed(&self, py: Python<'_>, ready: &Ready) -> PyResult<bool> {
        let fd = ready.events.fd();
        let Some(id) = self.subscribers.id_of(py, ready.token) else {
            return Ok(false);
        };
        let is_dropped = self.core.remove_if_closed(id, fd)?;
        if is_dropped {
            self.subscribers.forget_source(py, ready.token, fd);
        }
        Ok(is_dropped)
    }

    /// Before anything else, a lock above all: see `owned`.
    ///
    /// # Errors
    /// [`ErrorKind::State`] in a forked child, and where the interpreter ends.
    pub(super) fn check(&self) -> Result<()> {
        self.core.check_process()?;
        ending::check()
    }

    pub(super) fn core(&self) -> &EventManager {
        &self.core
    }

    pub(super) fn lead(&self) -> &Lead {
        &self.lead
    }

    pub(super) fn turners(&self) -> &Turners {
        &self.turners
    }

    /// What its turns have counted is forgotten.
    pub(super) fn forget_counts(&self) {
        self.watch.forget();
    }

    /// Have a call made by the thread that turns the loop.
    pub(super) fn queue(&self, call: Call) -> PyResult<()> {
        self.check()?;
        self.calls.push(call);
        Ok(self.core.kick()?)
    }

    pub(super) fn watch(&self) -> &Watch {
        &self.watch
    }

    pub(super) fn timers(&self) -> &Timers {
        &self.timers
    }

    pub(super) fn calls(&self) -> &Calls<Call> {
        &self.calls
    }

    /// Calls that were not made have the next dispatch look at them.
    pub(super) fn keep_calls(&self) -> PyResult<()> {
        if self.calls.keep() {
            self.core.kick()?;
        }
        Ok(())
    }

    /// Take the events fetched and not yet delivered, for an empty vector.
    fn swap_fetched(&self, empty: &mut Vec<Ready>) {
        // SAFETY: under the lock that guards them.
        self.core.locked(|| unsafe { self.fetched.swap(empty) });
    }

    /// With what the last delivery has left to be used again.
    pub(super) fn with_delivery<T>(&self, f: impl FnOnce(&mut Delivery) -> T) -> T {
        let mut delivery = std::mem::take(&mut *self.delivery.lock());
        let result = f(&mut delivery);
        // In a child that a callback has forked, the lock is its parent's.
        if self.core.check_process().is_err() {
            return result;
        }
        let former = std::mem::replace(&mut *self.delivery.lock(), delivery);
        // Outside the lock: it may hold Python objects.
        drop(former);
        result
    }

    /// Have an event that was not delivered reported again.
    pub(super) fn rearm(&self, py: Python<'_>, ready: &Ready) {
        if let Some(id) = self.subscribers.id_of(py, ready.token) {
            self.core.rearm(id, ready.events.fd());
        }
    }

    fn add_python(slf: &Bound<'_, Self>, token: u64, object: &Bound<'_, PyAny>) -> PyResult<()> {
        let this = slf.get();
        for method in ["init", "process"] {
            if !object.getattr_opt(method)?.is_some_and(|method| method.is_callable()) {
                let class = object.get_type();
                return Err(PyTypeError::new_err(format!(
                    "a subscriber needs {method}(): {} has none",
                    class.name()?
                )));
            }
        }
        let collector = Collector {
            token,
            removals: this.core.removal_counter(),
            fetched: Arc::clone(&this.fetched),
        };
        let (kept, context) = (object.clone().unbind(), Context::copy_current(slf.py())?);
        let id = slf.py().detach(|| this.core.add_unrecorded(Box::new(collector)));
        this.subscribers.insert(slf.py(), token, id, kept, context);
        callback::init(slf, token, object).inspect_err(|_| {
            // What init() raised is what the caller should see.
            let _ = this.take_out(slf.py(), token);
        })
    }

    fn check_id(&self, at: &str, id: &PySubscriberId) -> PyResult<()> {
        if id.manager == self.number {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Event, at, "this id is another event manager's").into())
    }

    fn take_out(&self, py: Python<'_>, token: u64) -> PyResult<Py<PyAny>> {
        self.core.check_process()?;
        let subscriber = self.subscribers.remove(py, token)?;
        py.detach(|| self.core.remove_subscriber(subscriber.id).map(drop))?;
        Ok(subscriber.into_object())
    }

    /// Dispatch once, waiting until this time at most; returns how many events were dispatched.
    fn turn(
        slf: &Bound<'_, Self>,
        deadline: Option<Instant>,
        delivery: &mut Delivery,
    ) -> PyResult<usize> {
        let recording = slf.get().core.recorders.recording();
        let result = Self::fetch_and_deliver(slf, deadline, delivery);
        if recording.is_some() {
            slf.py().detach(trace::flush);
        }
        result
    }

    fn fetch_and_deliver(
        slf: &Bound<'_, Self>,
        deadline: Option<Instant>,
        delivery: &mut Delivery,
    ) -> PyResult<usize> {
        let this = slf.get();
        let ready = delivery.emptied();
        // SAFETY: `try_dispatch` calls it under the lock that guards them.
        let take = || unsafe { this.fetched.swap(ready) };
        // What is ready is fetched without letting the GIL go: that costs less than the fetching.
        let Some(_leading) = this.lead.begin() else {
            // A machine's thread makes a turn.
            slf.py().detach(|| this.lead.wait(deadline));
            return Ok(0);
        };
        if let Some(fetched) = this.core.try_dispatch(take)? {
            return Self::deliver(slf, fetched, delivery);
        }
        let fetched = slf.py().detach(|| callback::wait(&this.core, deadline))?;
        this.swap_fetched(delivery.emptied());
        Self::deliver(slf, fetched, delivery)
    }

    /// Deliver what a wait has fetched.
    pub(super) fn deliver_fetched(slf: &Bound<'_, Self>, fetched: usize) -> PyResult<usize> {
        let this = slf.get();
        this.with_delivery(|delivery| {
            this.swap_fetched(delivery.emptied());
            Self::deliver(slf, fetched, delivery)
        })
    }

    /// Hand over what was fetched; returns how many events were dispatched.
    fn deliver(slf: &Bound<'_, Self>, fetched: usize, delivery: &mut Delivery) -> PyResult<usize> {
        let delivered = callback::deliver(slf, delivery, fetched)?;
        slf.get().watch.count_turn(delivered);
        Ok(delivered)
    }
}

impl Drop for PyEventManager {
    /// What another thread may have been changing at the fork is left as it is.
    fn drop(&mut self) {
        if self.check().is_err() {
            std::mem::forget(Arc::clone(&self.core));
            std::mem::forget(std::mem::take(&mut self.calls));
        }
    }
}

#[pymethods]
impl PyEventManager {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self::over(Arc::new(EventManager::new()?)))
    }

    /// Register an object with `init(ops)` and `process(events, ops)`; calls its `init` before it
    /// returns.
    ///
    /// Raises:
    ///     TypeError: a method is missing.
    ///     Exception: what `init` raised; the subscriber is not registered then.
    pub(super) fn add_subscriber(
        slf: &Bound<'_, Self>,
        subscriber: &Bound<'_, PyAny>,
    ) -> PyResult<PySubscriberId> {
        let this = slf.get();
        this.check()?;
        let token = this.next_token.fetch_add(1, Ordering::Relaxed);
        match as_native_subscriber(subscriber)? {
            Some(native) => {
                let context = Context::copy_current(slf.py())?;
                let object = subscriber.clone().unbind();
                let id = slf.py().detach(|| this.core.add_subscriber(native));
                this.subscribers.insert(slf.py(), token, id, object, context);
            }
            None => Self::add_python(slf, token, subscriber)?,
        }
        Ok(PySubscriberId { manager: this.number, token })
    }

    /// Unregister a subscriber with all its file descriptors and return it.
    ///
    /// Raises:
    ///     EventError: this manager has no such subscriber, or no longer.
    pub(super) fn remove_subscriber(
        &self,
        py: Python<'_>,
        id: &PySubscriberId,
    ) -> PyResult<Py<PyAny>> {
        self.check()?;
        self.check_id("EventManager.remove_subscriber", id)?;
        self.take_out(py, id.token)
    }

    /// What changes the registrations of a subscriber, from any thread, while it is registered.
    ///
    /// Raises:
    ///     EventError: this manager has no such subscriber, or no longer.
    fn event_ops(slf: &Bound<'_, Self>, id: &PySubscriberId) -> PyResult<PyEventOps> {
        slf.get().check()?;
        slf.get().check_id("EventManager.event_ops", id)?;
        slf.get().subscribers.known_id(slf.py(), id.token)?;
        Ok(PyEventOps::lasting(slf.clone().unbind(), id.token))
    }

    /// Wait for events, dispatch them once, and return how many there were.
    ///
    /// The first exception of a callback ends the dispatch and comes out of here. Level-triggered
    /// events behind it are reported again by the next run.
    ///
    /// Raises:
    ///     StateError: another thread, or a callback's caller, is in `run`.
    fn run(slf: &Bound<'_, Self>) -> PyResult<usize> {
        Self::run_with_timeout(slf, -1)
    }

    /// `run` for at most this long, 0 when the time passed. A negative number is no limit.
    fn run_with_timeout(slf: &Bound<'_, Self>, milliseconds: i32) -> PyResult<usize> {
        slf.get().check()?;
        let _turning = slf.get().turners.claim("this event manager", None)?;
        let limit = u64::try_from(milliseconds).ok().map(Duration::from_millis);
        let deadline = limit.map(|limit| Instant::now() + limit);
        slf.get().with_delivery(|delivery| {
            loop {
                let dispatched = Self::turn(slf, deadline, delivery)?;
                if dispatched > 0 || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Ok(dispatched);
                }
                slf.py().check_signals()?;
            }
        })
    }

    /// Dispatch until `stop` is called or a callback raises; raises as `run` does.
    fn run_forever(slf: &Bound<'_, Self>) -> PyResult<()> {
        let this = slf.get();
        this.check()?;
        let _turning = this.turners.claim("this event manager", None)?;
        let mut pace = Pace::new(slf.py())?;
        this.with_delivery(|delivery| {
            while !this.calls.take_stop() {
                if Self::turn(slf, None, delivery)? == 0 {
                    slf.py().check_signals()?;
                }
                pace.turned()?;
            }
            Ok(())
        })
    }

    /// End `run_forever` or `run_async`, or at once the next one. From any thread or callback.
    fn stop(&self) -> PyResult<()> {
        self.check()?;
        self.calls.stop();
        Ok(self.core.kick()?)
    }

    /// A way to reach this loop from other threads.
    fn remote_endpoint(slf: Py<Self>) -> PyRemoteEndpoint {
        PyRemoteEndpoint::of(slf)
    }

    /// Decorate a function to be called with each event of a source; `data` and `drain` are as for
    /// `Events`.
    ///
    /// The function gets the attributes `subscriber_id`, for `remove_subscriber`, and
    /// `subscriber_ids`, which has those of the decorators beneath too. In place of what takes no
    /// attributes, as a method, comes a callable that does.
    #[pyo3(signature = (source, event_set = EventSet::IN.bits(), data = 0, *, drain = false))]
    fn on<'py>(
        slf: &Bound<'py, Self>,
        source: &Bound<'py, PyAny>,
        event_set: u32,
        data: u32,
        drain: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        slf.get().check()?;
        let callbacks = import(slf.py(), "pyvmm.callbacks")?;
        callbacks.call_method1("on", (slf, source, event_set, data, drain))
    }

    /// Whether it names a subscriber of this manager that is registered no longer.
    fn _has_removed(&self, py: Python<'_>, id: &PySubscriberId) -> bool {
        id.manager == self.number && self.subscribers.id_of(py, id.token).is_none()
    }

    fn _note_callback(&self, py: Python<'_>, name: &str, seconds: f64) -> PyResult<()> {
        let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        self.watch.note(py, || Ok(name.to_owned()), took)
    }

    fn _take_stop(&self) -> bool {
        self.calls.take_stop()
    }

    /// A file descriptor for other loops to wait on: readable when an event is ready. The same as
    /// long as the manager lives.
    ///
    /// Raises:
    ///     StateError: in a forked child, whose parent's it is.
    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        self.check()?;
        Ok(py.detach(|| self.core.host_fd())?)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("EventManager(subscribers={})", self.subscribers.len(py))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        // A lock is held by another thread only while that one has let the GIL go, and for no
        // Python object's sake.
        self.subscribers.traverse(&visit)?;
        if self.core.check_process().is_err() {
            return Ok(());
        }
        self.turners.traverse(&visit)?;
        self.timers.traverse(&visit)?;
        self.calls.try_for_each(|call| call.traverse(&visit))
    }

    fn __clear__(&self, py: Python<'_>) {
        let subscribers = self.subscribers.take_all(py);
        if self.core.check_process().is_err() {
            return;
        }
        let calls = self.calls.take_all();
        let awaiters = self.turners.take_awaiters();
        // Outside the locks: it may run Python code.
        drop((subscribers, calls, awaiters, self.timers.take_all(py)));
    }
}
