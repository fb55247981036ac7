//! `EventManager` for Python: the crate's manager, the Python objects subscribed to it, and the
//! queue between them. `registration.rs` changes the subscribers, `run.rs` runs the loop, and
//! `delivery.rs` calls the subscribers.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use event_manager::EventSet;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::loop_call::Call;
use super::owners::LoopOwners;
use super::queue::{EventQueue, QueuedEvent};
use super::stats::LoopStats;
use super::subscribers::{Receiver, Subscribers};
use super::timers::Timers;
use crate::error::Result;
use crate::event::{Calls, EventManager};
use crate::py::ending;
use crate::py::exit::timeout as as_timeout;
use crate::sync::{Mutex, rank};

/// Subscribers, and the loop that dispatches events to them by file descriptor.
///
/// One thread at a time may run the loop. Any thread may add and remove subscribers meanwhile. The
/// manager needs no machine and no /dev/kvm.
#[pyclass(frozen, weakref, name = "EventManager", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEventManager {
    core: Arc<EventManager>,
    /// The events that the last dispatch fetched for Python.
    event_queue: Arc<EventQueue>,
    /// The event buffer for the next delivery.
    batch: Mutex<Vec<QueuedEvent>, rank::Delivery>,
    subscribers: Subscribers,
    next_token: AtomicU64,
    /// Tells this manager's ids from another's.
    number: u64,
    owners: LoopOwners,
    /// Requests of other threads to the loop's thread.
    calls: Calls<Call>,
    stats: LoopStats,
    timers: Timers,
}

impl PyEventManager {
    pub(crate) fn over(core: Arc<EventManager>) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self {
            core,
            event_queue: Arc::default(),
            batch: Mutex::default(),
            subscribers: Subscribers::default(),
            next_token: AtomicU64::new(0),
            // Relaxed, here and below: the numbers only have to be unique.
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            owners: LoopOwners::default(),
            calls: Calls::default(),
            stats: LoopStats::default(),
            timers: Timers::default(),
        }
    }

    pub(crate) fn shared_core(&self) -> Arc<EventManager> {
        Arc::clone(&self.core)
    }

    pub(crate) fn subscribers(&self) -> &Subscribers {
        &self.subscribers
    }

    /// The subscriber of an event, if it still watches for it.
    pub(crate) fn receiver<'py>(
        &self,
        py: Python<'py>,
        ready: &QueuedEvent,
    ) -> PyResult<Option<Receiver<'py>>> {
        let hang_up = EventSet::HANG_UP | EventSet::ERROR;
        if ready.events.event_set().intersects(hang_up) && self.drop_closed(py, ready)? {
            return Ok(None);
        }
        self.subscribers.receiver(py, ready, &self.core)
    }

    /// Drop a registration if its number was closed. Returns whether it was.
    fn drop_closed(&self, py: Python<'_>, ready: &QueuedEvent) -> PyResult<bool> {
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

    /// Called before anything else, especially before any lock: see `owned`.
    ///
    /// # Errors
    /// [`ErrorKind::State`](crate::error::ErrorKind::State) in a forked child, and while the
    /// interpreter ends.
    pub(crate) fn check(&self) -> Result<()> {
        self.core.check_process()?;
        ending::check()
    }

    pub(crate) fn core(&self) -> &EventManager {
        &self.core
    }

    pub(crate) fn owners(&self) -> &LoopOwners {
        &self.owners
    }

    /// Reset the counts of the loop.
    pub(crate) fn forget_counts(&self) {
        self.stats.forget();
    }

    /// Queue a call for the loop's thread.
    pub(crate) fn queue(&self, call: Call) -> PyResult<()> {
        self.check()?;
        self.calls.push(call);
        Ok(self.core.kick()?)
    }

    pub(crate) fn stats(&self) -> &LoopStats {
        &self.stats
    }

    pub(crate) fn timers(&self) -> &Timers {
        &self.timers
    }

    pub(crate) fn calls(&self) -> &Calls<Call> {
        &self.calls
    }

    /// Keep calls that were not made for the next dispatch.
    pub(crate) fn keep_calls(&self) -> PyResult<()> {
        if self.calls.keep() {
            self.core.kick()?;
        }
        Ok(())
    }

    /// Call `f` with the event buffer, which each delivery reuses.
    pub(crate) fn with_batch<T>(&self, f: impl FnOnce(&mut Vec<QueuedEvent>) -> T) -> T {
        let mut batch = std::mem::take(&mut *self.batch.lock());
        let result = f(&mut batch);
        // If a callback has forked, the child's lock belongs to the parent.
        if self.core.check_process().is_ok() {
            *self.batch.lock() = batch;
        }
        result
    }

    /// The queue to which a dispatch adds the events for Python.
    pub(crate) fn event_queue(&self) -> &Arc<EventQueue> {
        &self.event_queue
    }

    /// Tells this manager's ids from another's.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// A token that no other subscriber gets.
    pub(crate) fn new_token(&self) -> u64 {
        self.next_token.fetch_add(1, Ordering::Relaxed)
    }

    /// Report an event again that was not delivered.
    pub(crate) fn rearm(&self, py: Python<'_>, ready: &QueuedEvent) {
        if let Some(id) = self.subscribers.id_of(py, ready.token) {
            self.core.rearm(id, ready.events.fd());
        }
    }
}

impl Drop for PyEventManager {
    /// In a forked child, data that another thread may have been changing is not dropped.
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

    /// End `run_forever` or `run_async`. If none is in progress, the next one ends at once.
    ///
    /// May be called from any thread or callback.
    fn stop(&self) -> PyResult<()> {
        self.check()?;
        self.calls.stop();
        Ok(self.core.kick()?)
    }

    /// The seconds after which a callback counts as slow; None disables the check.
    ///
    /// A slow callback is logged with its name, as a warning of the logger "pyvmm".
    ///
    /// Raises:
    ///     ValueError: it is set to a negative number or NaN.
    #[getter(slow_callback_duration)]
    fn threshold(&self) -> PyResult<Option<f64>> {
        self.check()?;
        Ok(self.stats().slow_callback().map(|threshold| threshold.as_secs_f64()))
    }

    #[setter(slow_callback_duration)]
    fn set_threshold(&self, seconds: Option<f64>) -> PyResult<()> {
        self.check()?;
        self.stats().set_slow_callback(as_timeout(seconds)?);
        Ok(())
    }

    /// The name of the slowest callback and its seconds, or None before a callback was timed.
    ///
    /// Callbacks are timed while `slow_callback_duration` is set.
    #[getter]
    fn slowest_callback(&self) -> PyResult<Option<(String, f64)>> {
        self.check()?;
        let (took, name) = self.stats().slowest();
        Ok((!name.is_empty()).then_some((name, took.as_secs_f64())))
    }

    /// The number of loop iterations.
    #[getter]
    fn turns(&self) -> PyResult<u64> {
        self.check()?;
        Ok(self.stats().turns())
    }

    /// The number of dispatched events.
    #[getter]
    fn dispatched(&self) -> PyResult<u64> {
        self.check()?;
        Ok(self.stats().dispatched())
    }

    fn _note_callback(&self, py: Python<'_>, name: &str, seconds: f64) -> PyResult<()> {
        let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        self.stats.note(py, || Ok(name.to_owned()), took)
    }

    fn _take_stop(&self) -> bool {
        self.calls.take_stop()
    }

    /// A file descriptor for other loops to wait on. It is readable when an event is ready.
    ///
    /// It stays the same for the life of the manager.
    ///
    /// Raises:
    ///     StateError: the process is a forked child, and the manager belongs to its parent.
    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        self.check()?;
        Ok(py.detach(|| self.core.host_fd())?)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("EventManager(subscribers={})", self.subscribers.len(py))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        // Another thread holds a lock only while it has released the GIL, and not for Python
        // objects.
        self.subscribers.traverse(&visit)?;
        if self.core.check_process().is_err() {
            return Ok(());
        }
        self.owners.traverse(&visit)?;
        self.timers.traverse(&visit)?;
        self.calls.try_for_each(|call| call.traverse(&visit))
    }

    fn __clear__(&self, py: Python<'_>) {
        let subscribers = self.subscribers.take_all(py);
        if self.core.check_process().is_err() {
            return;
        }
        let calls = self.calls.take_all();
        let awaiters = self.owners.take_awaiters();
        // Outside the locks, because this may run Python code.
        drop((subscribers, calls, awaiters, self.timers.take_all(py)));
    }
}
