//! `RemoteEndpoint` for Python: calls made on the loop's thread from any other. Upstream's endpoint
//! makes its calls inside a dispatch, under the manager's lock, where no Python code may run. Here
//! the calls are queued and made after the fetched events.

use std::sync::Arc;
use std::time::Instant;

use pyo3::exceptions::{PyKeyboardInterrupt, PySystemExit, PyTimeoutError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::loop_call::{Call, Reply, check_callable};
use super::manager::PyEventManager;
use crate::limit::deadline_of;
use crate::py::depth;
use crate::py::exit::timeout as as_timeout;
use crate::py::recorded::{name_of, recorded};
use crate::py::returned::take_returned;
use crate::py::wakeup::SIGNAL_CHECK_INTERVAL;

/// Whether an exception must also end the run, and not only reach the caller. For example, Ctrl-C
/// interrupts whatever the main thread is doing.
fn is_everyones(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<PyKeyboardInterrupt>(py) || error.is_instance_of::<PySystemExit>(py)
}

fn make(call: &Call, manager: &Bound<'_, PyEventManager>) -> PyResult<Py<PyAny>> {
    let (this, py) = (manager.get(), manager.py());
    let name = || name_of(call.function.bind(py));
    call.context.run(py, || {
        let made = || recorded(name, || call.function.call1(py, (manager,)));
        let value = this.stats().timed(py, name, made)?;
        if call.reply.is_none() {
            take_returned(|py| this.owners().awaiter(py), value.bind(py), name)?;
        }
        Ok(value)
    })
}

/// Make the calls requested by other threads that were queued when this began.
pub(crate) fn make_calls(manager: &Bound<'_, PyEventManager>) -> PyResult<()> {
    let (this, py) = (manager.get(), manager.py());
    let mut replies = Vec::new();
    let mut made = Ok(());
    for _ in 0..this.calls().waiting() {
        let Some(call) = this.calls().pop() else {
            break;
        };
        let result = make(&call, manager);
        if let Err(refused) = this.core().check_process() {
            // If the function has forked, no thread waits in the child.
            std::mem::forget((call.reply, replies));
            return result.and(Err(refused.into()));
        }
        if let Err(error) = &result
            && (call.reply.is_none() || is_everyones(py, error))
        {
            made = Err(error.clone_ref(py));
        }
        match (call.reply, result) {
            // The caller has stopped waiting: report the exception.
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
        // Without the GIL, which the waiting callers need next.
        py.detach(|| replies.into_iter().for_each(|(reply, result)| reply.give(result)));
    }
    made
}

/// Reaches an event manager's loop from other threads. Created by `EventManager.remote_endpoint`.
#[pyclass(frozen, weakref, name = "RemoteEndpoint", module = "pyvmm")]
#[derive(Debug)]
pub struct PyRemoteEndpoint(Py<PyEventManager>);

#[pymethods]
impl PyEventManager {
    /// Return an endpoint that reaches this loop from other threads.
    fn remote_endpoint(slf: Py<Self>) -> PyRemoteEndpoint {
        PyRemoteEndpoint(slf)
    }
}

#[pymethods]
impl PyRemoteEndpoint {
    /// Call `function(manager)` on the loop's thread, and return its value or raise its exception.
    ///
    /// On the loop's own thread, the function is called directly. Otherwise another thread must be
    /// running the loop.
    ///
    /// Raises:
    ///     TimeoutError: the call was not made within `timeout` seconds; it may still be made
    ///         later.
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
        if manager.owners().has_this_thread() {
            depth::check()?;
            return function.call1((&self.0,)).map(Bound::unbind);
        }
        let deadline = deadline_of(as_timeout(timeout)?);
        let reply = Arc::new(Reply::default());
        let call = Call::new(function, Some(Arc::clone(&reply)))?;
        // Without the GIL, which the loop needs for the call.
        if let Some(result) = py.detach(|| manager.queue(call).map(|()| reply.spin()))? {
            return result;
        }
        loop {
            let left = deadline.map_or(SIGNAL_CHECK_INTERVAL, |deadline| {
                deadline.saturating_duration_since(Instant::now()).min(SIGNAL_CHECK_INTERVAL)
            });
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

    /// Queue a call of `function(manager)` on the loop's thread, and return at once.
    ///
    /// An exception of the function ends the run there.
    fn fire(&self, function: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.get().check()?;
        check_callable(function)?;
        self.0.get().queue(Call::new(function, None)?)
    }

    /// Make the loop iterate once.
    fn kick(&self) -> PyResult<()> {
        self.0.get().check()?;
        Ok(self.0.get().core().kick()?)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}
