//! `TimerFd` for Python: a timer as a source of events.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::batch::Drain;
use super::ending::import;
use super::event_fd::os_error;
use crate::event::{Expiry, TimerFd};
use crate::sync::{Mutex, rank};

/// A timer behind a file descriptor, on the monotonic clock: timerfd_create(2). A source of events.
#[pyclass(frozen, weakref, name = "TimerFd", module = "pyvmm")]
#[derive(Debug)]
pub struct PyTimerFd(Mutex<Option<Arc<TimerFd>>, rank::TimerObject>);

impl Drain for TimerFd {
    fn take(&self) -> io::Result<u64> {
        self.read()
    }
}

impl PyTimerFd {
    pub(super) fn open(&self) -> PyResult<Arc<TimerFd>> {
        self.0.lock().clone().ok_or_else(|| PyValueError::new_err("this TimerFd is closed"))
    }

    fn start(&self, first: Expiry, interval: f64) -> PyResult<()> {
        self.open()?.set(first, seconds("interval", interval)?).map_err(|e| os_error(&e))
    }
}

#[pymethods]
impl PyTimerFd {
    #[new]
    fn new() -> PyResult<Self> {
        let timer = TimerFd::new().map_err(|e| os_error(&e))?;
        Ok(Self(Mutex::new(Some(Arc::new(timer)))))
    }

    /// Expire so many seconds later, and with an interval again and again. Expirations so far are forgotten.
    ///
    /// Raises:
    ///     ValueError: a time is negative, NaN or too long, or the timer is closed.
    #[pyo3(signature = (delay, interval = 0.0))]
    fn set(&self, delay: f64, interval: f64) -> PyResult<()> {
        self.start(Expiry::In(seconds("delay", delay)?), interval)
    }

    /// Expire at a time of `time.monotonic()`; one that has passed is at once.
    #[pyo3(signature = (time, interval = 0.0))]
    fn set_at(&self, time: f64, interval: f64) -> PyResult<()> {
        self.start(Expiry::At(seconds("time", time)?), interval)
    }

    /// Unset it and forget the expirations so far.
    fn clear(&self) -> PyResult<()> {
        self.open()?.clear().map_err(|e| os_error(&e))
    }

    /// How often it has expired since the last read or set; missed ticks are counted.
    ///
    /// Raises:
    ///     BlockingIOError: it has not.
    fn read(&self) -> PyResult<u64> {
        self.open()?.read().map_err(|e| os_error(&e))
    }

    /// The file descriptor's number.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.open()?.as_raw_fd())
    }

    /// Close the descriptor.
    fn close(&self) {
        drop(self.0.lock().take());
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.0.lock().is_none()
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(&self, _kind: Py<PyAny>, _error: Py<PyAny>, _traceback: Py<PyAny>) {
        self.close();
    }

    fn __aiter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pyvmm.aio")?.call_method1("reads", (slf,))
    }

    fn __repr__(&self) -> String {
        match &*self.0.lock() {
            Some(timer) => format!("TimerFd(fileno={})", timer.as_raw_fd()),
            None => "TimerFd(closed)".into(),
        }
    }
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|_| {
        PyValueError::new_err(format!("{name}: {value} is not a number of seconds from 0"))
    })
}
