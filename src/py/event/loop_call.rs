//! Calls requested by other threads, and the replies that their callers wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::context::Context;
use crate::sync::{Condvar, Mutex, rank};

/// How long a caller polls for its result before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

/// A call that waits for the loop's thread.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) function: Py<PyAny>,
    /// The caller's context.
    pub(crate) context: Context,
    /// None if no caller waits. Then an exception ends the run.
    pub(crate) reply: Option<Arc<Reply>>,
}

impl Call {
    pub(crate) fn new(function: &Bound<'_, PyAny>, reply: Option<Arc<Reply>>) -> PyResult<Self> {
        let context = Context::copy_current(function.py())?;
        Ok(Self { function: function.clone().unbind(), context, reply })
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.function)?;
        visit.call(self.context.object())
    }
}

/// Where a caller waits for its call.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    result: Mutex<Option<PyResult<Py<PyAny>>>, rank::Reply>,
    is_made: AtomicBool,
    made: Condvar,
}

impl Reply {
    pub(crate) fn give(&self, result: PyResult<Py<PyAny>>) {
        let former = self.result.lock().replace(result);
        self.is_made.store(true, Ordering::Release);
        self.made.notify_all();
        drop(former);
    }

    /// Wait without sleeping, because a wake-up takes longer than a short call.
    pub(crate) fn spin(&self) -> Option<PyResult<Py<PyAny>>> {
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

    pub(crate) fn wait(&self, slice: Duration) -> Option<PyResult<Py<PyAny>>> {
        let mut result = self.result.lock();
        if result.is_none() {
            self.made.wait_for(&mut result, slice);
        }
        result.take()
    }
}

pub(crate) fn check_callable(function: &Bound<'_, PyAny>) -> PyResult<()> {
    if function.is_callable() {
        return Ok(());
    }
    let class = function.get_type();
    Err(PyTypeError::new_err(format!("expected a function, not {}", class.name()?)))
}
