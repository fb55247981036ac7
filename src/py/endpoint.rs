//! `RemoteEndpoint` for Python: calls made on the loop's thread from any other.
//!
//! Upstream's endpoint calls inside a dispatch, under the manager's lock, where no Python code may
//! run. Here the calls wait in a queue beside the fetched events and are made after them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PySystemExit, PyTimeoutError, PyTypeError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::awaiting::take_returned;
use super::context::Context;
use super::event_manager::PyEventManager;
use super::exit::timeout as as_timeout;
use super::trace::{name_of, recorded};
use crate::sync::{Condvar, Mutex, rank};

/// How long a caller looks for its result before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

/// A call that waits for the loop's thread.
#[derive(Debug)]
pub(super) struct Call {
    function: Py<PyAny>,
    /// That of whoever asks.
    context: Context,
    /// None: nobody waits, and an exception ends the run.
    reply: Option<Arc<Reply>>,
}

impl Call {
    fn new(function: &Bound<'_, PyAny>, reply: Option<Arc<Reply>>) -> PyResult<Self> {
        let context = Context::copy_current(function.py())?;
        Ok(Self { function: function.clone().unbind(), context, reply })
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.function)?;
        visit.call(self.context.object())
    }

    fn make(&self, manager: &Bound<'_, PyEventManager>) -> PyResult<Py<PyAny>> {
        let (this, py) = (manager.get(), manager.py());
        let name = || name_of(self.function.bind(py));
        self.context.run(py, || {
            let call = || recorded(name, || self.function.call1(py, (manager,)));
            let value = this.watch().timed(py, name, call)?;
            if self.reply.is_none() {
                take_returned(this, value.bind(py), name)?;
            }
            Ok(value)
        })
    }
}

/// Whether an exception is the whole program's to hear, and not only that of whoever asked for the
/// call: Ctrl-C, for one, comes in whatever the main thread does.
fn is_everyones(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<PyKeyboardInterrupt>(py) || error.is_instance_of::<PySystemExit>(py)
}

/// Where a caller waits for its call.
#[derive(Debug, Default)]
pub(super) struct Reply {
    result: Mutex<Option<PyResult<Py<PyAny>>>, rank::Reply>,
    is_made: AtomicBool,
    made: Condvar,
}

impl Reply {
    pub(super) fn give(&self, result: PyResult<Py<PyAny>>) {
        let former = self.result.lock().replace(result);
        self.is_made.store(true, Ordering::Release);
        self.made.notify_all();
        drop(former);
    }

    /// Wait without sleeping: to be woken costs more than a short call takes.
    fn spin(&self) -> Option<PyResult<Py<PyAny>>> {
        let end = Instant::now() + SPIN;
        while Instant::now() < end {
            // Acquire: pairs with the release in `give`.
            if self.is_made.load(Ordering::Acquire) {
                return self.result.lock().take();
            }
            std::hint::spin_loop();
        }
        None
    }

    fn wait(&self, slice: Duration) -> Option<PyResult<Py<PyAny>>> {
        let mut result = self.result.lock();
        if result.is_none() {
            self.made.wait_for(&mut result, slice);
        }
        result.take()
    }
}

/// Make the calls that other threads have asked for: those that were there when it began.
pub(super) fn make_calls(manager: &Bound<'_, PyEventManager>) -> PyResult<()> {
    let (this, py) = (manager.get(), manager.py());
    let mut replies = Vec::new();
    let mut made = Ok(());
    for _ in 0..this.calls().waiting() {
        let Some(call) = this.calls().pop() else {
            break;
        };
        let result = call.make(manager);
        if let Err(refused) = this.core().check_process() {
            // A child that the function has forked: whoever waits is its parent's.
            std::mem::forget((call.reply, replies));
            return result.and(Err(refused.into()));
        }
        if let Err(error) = &result
            && (call.reply.is_none() || is_everyones(py, error))
        {
            made = Err(error.clone_ref(py));
        }
        match (call.reply, result) {
            // The caller has waited long enough: nobody else hears of it.
            (Some(reply), Err(error)) if Arc::strong_count(&reply) == 1 && made.is_ok() => {
                error.write_unraisable(py, None);
            }
            (Some(reply), result) => replies.push((reply, result)),
            (None, _) => {}
        }
        if made.is_err() {
            break;
        }
    }
    if !replies.is_empty() {
        // Without the GIL, which those who wait for the answers take at once.
        py.detach(|| replies.into_iter().for_each(|(reply, result)| reply.give(result)));
    }
    made
}

/// Reaches an event manager's loop from other threads. Made by `EventManager.remote_endpoint`.
#[pyclass(frozen, weakref, name = "RemoteEndpoint", module = "pyvmm")]
#[derive(Debug)]
pub struct PyRemoteEndpoint(Py<PyEventManager>);

impl PyRemoteEndpoint {
    pub(super) fn of(manager: Py<PyEventManager>) -> Self {
        Self(manager)
    }
}

pub(super) fn check_callable(function: &Bound<'_, PyAny>) -> PyResult<()> {
    if function.is_callable() {
        return Ok(());
    }
    let class = function.get_type();
    Err(PyTypeError::new_err(format!("a function is needed here, not {}", class.name()?)))
}

#[pymethods]
impl PyRemoteEndpoint {
    /// Call a function with the manager, on the loop's thread; its value, or its exception, comes
    /// back here.
    ///
    /// On the loop's own thread it is called at once. Else some thread has to be in a run of the
    /// loop.
    ///
    /// Raises:
    ///     TimeoutError: the call was not made within so many seconds; it may still be made.
    #[pyo3(signature = (function, timeout = None))]
    fn call_blocking(
        &self,
        py: Python<'_>,
        function: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        check_callable(function)?;
        let manager = self.0.get();
        manager.check()?;
        if manager.turners().has_this_thread() {
            return function.call1((&self.0,)).map(Bound::unbind);
        }
        let deadline = as_timeout(timeout)?.and_then(|limit| Instant::now().checked_add(limit));
        let reply = Arc::new(Reply::default());
        let call = Call::new(function, Some(Arc::clone(&reply)))?;
        // Without the GIL, which the loop needs for the call.
        if let Some(result) = py.detach(|| manager.queue(call).map(|()| reply.spin()))? {
            return result;
        }
        loop {
            let slice = Duration::from_millis(50);
            let left =
                deadline.map_or(slice, |d| d.saturating_duration_since(Instant::now()).min(slice));
            if let Some(result) = py.detach(|| reply.wait(left)) {
                return result;
            }
            py.check_signals()?;
            if left.is_zero() {
                let text = "the loop has not made the call in time; is a thread in its run()?";
                return Err(PyTimeoutError::new_err(text));
            }
        }
    }

    /// Have a function called with the manager on the loop's thread. Its exception ends the run
    /// there.
    fn fire(&self, function: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.get().check()?;
        check_callable(function)?;
        self.0.get().queue(Call::new(function, None)?)
    }

    /// Have the loop turn once.
    fn kick(&self) -> PyResult<()> {
        self.0.get().check()?;
        Ok(self.0.get().core().kick()?)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}
