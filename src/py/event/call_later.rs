//! `EventManager.call_later`, and the due calls, which are made on the loop's thread.

use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::context::Context;
use super::loop_call::check_callable;
use super::manager::PyEventManager;
use super::timers::{NEVER, ScheduledCall, now};
use crate::py::ending::import;
use crate::py::recorded::{name_of, recorded};
use crate::py::returned::take_returned;

/// Make the due calls. Returns their number. The first exception ends this, and the next iteration
/// makes the others.
pub(crate) fn make_due(manager: &Bound<'_, PyEventManager>) -> PyResult<usize> {
    let (this, py) = (manager.get(), manager.py());
    let timers = this.timers();
    let at = now();
    // A call scheduled by one of these waits for the next iteration.
    let last = timers.last(py);
    let (mut made, mut result) = (0, Ok(()));
    while let Some(later) = timers.pop_due(py, at, last) {
        made += 1;
        result = make(&later, manager);
        // If the call has forked, the child's timer belongs to the parent.
        if let Err(refused) = this.core().check_process() {
            return result.and(Err(refused.into()));
        }
        if result.is_err() {
            break;
        }
    }
    result.and(timers.set_timer(py)).map(|()| made)
}

fn make(scheduled: &ScheduledCall, manager: &Bound<'_, PyEventManager>) -> PyResult<()> {
    let (this, py) = (manager.get(), manager.py());
    let function = scheduled.function.bind(py);
    let name = || name_of(function);
    scheduled.context.run(py, || {
        let call = || recorded(name, || function.call1(scheduled.arguments.bind(py)));
        let returned = this.stats().timed(py, name, call)?;
        take_returned(|py| this.owners().awaiter(py), &returned, name)
    })
}

#[pymethods]
impl PyEventManager {
    /// Call a function once with these arguments, after `seconds`. The result has `cancel()`.
    ///
    /// If the time is in the past, the call is made in the next iteration. Calls are made in the
    /// order of their times, and share one file descriptor. The function runs in `context`, or in a
    /// copy of the caller's context.
    ///
    /// Raises:
    ///     ValueError: the time is NaN.
    #[pyo3(signature = (seconds, function, *arguments, context = None))]
    fn call_later<'py>(
        slf: &Bound<'py, Self>,
        seconds: f64,
        function: &Bound<'py, PyAny>,
        arguments: &Bound<'py, PyTuple>,
        context: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (this, py) = (slf.get(), slf.py());
        this.check()?;
        check_callable(function)?;
        if seconds.is_nan() {
            return Err(PyValueError::new_err("delay: nan is not a number of seconds"));
        }
        let delay = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(NEVER);
        let due = now().saturating_add(delay).min(NEVER);
        this.timers().ensure_timer(py, this.core())?;
        let call = ScheduledCall {
            due,
            function: function.clone().unbind(),
            arguments: arguments.clone().unbind(),
            context: Context::given(context, py)?,
        };
        let number = this.timers().schedule(py, call)?;
        import(py, "pyvmm.callbacks")?.call_method1("TimerHandle", (slf, number, due.as_secs_f64()))
    }

    /// Cancel a call. Returns false if it was already made or cancelled.
    fn _cancel_later(&self, py: Python<'_>, number: u64) -> bool {
        self.timers().cancel(py, number)
    }
}
