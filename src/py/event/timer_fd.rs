//! `TimerFd` for Python: a timer as a source of events.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use super::private_numbers::{give_out, keep_private, take};
use super::queue::Drain;
use super::reader::Reader;
use crate::error::Error;
use crate::event::{Expiry, TimerFd};
use crate::poll::{is_blocking, read_count};
use crate::py::descriptor::os_error;
use crate::py::ending::import;
use crate::sync::{Mutex, rank};

/// A timer with a file descriptor, on the monotonic clock: timerfd_create(2). It is a source of
/// events.
#[pyclass(frozen, weakref, name = "TimerFd", module = "pyvmm")]
#[derive(Debug)]
pub struct PyTimerFd {
    timer: Mutex<Option<Arc<TimerFd>>, rank::TimerObject>,
    /// The task that iterates it.
    reader: Reader,
}

impl Drain for TimerFd {
    fn take(&self) -> io::Result<u64> {
        take(self.as_raw_fd())
    }
}

impl PyTimerFd {
    pub(crate) fn open(&self) -> PyResult<Arc<TimerFd>> {
        let timer = self.timer.lock().clone();
        timer.ok_or_else(|| Error::closed("TimerFd").into())
    }

    /// The number, for the binding's own use.
    pub(super) fn number(&self) -> Option<RawFd> {
        self.timer.lock().as_ref().map(|timer| timer.as_raw_fd())
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
        keep_private(timer.as_raw_fd());
        Ok(Self { timer: Mutex::new(Some(Arc::new(timer))), reader: Reader::default() })
    }

    /// Expire after `delay` seconds, and then every `interval` seconds if it is not 0. Clears
    /// previous expirations.
    ///
    /// Raises:
    ///     ValueError: a time is negative, NaN or too long.
    ///     ClosedError: the timer is closed.
    #[pyo3(signature = (delay, interval = 0.0))]
    fn set(&self, delay: f64, interval: f64) -> PyResult<()> {
        self.start(Expiry::In(seconds("delay", delay)?), interval)
    }

    /// Expire at a time of `time.monotonic()`. If that time has passed, the timer expires at once.
    #[pyo3(signature = (time, interval = 0.0))]
    fn set_at(&self, time: f64, interval: f64) -> PyResult<()> {
        self.start(Expiry::At(seconds("time", time)?), interval)
    }

    /// Disarm the timer and clear previous expirations.
    fn clear(&self) -> PyResult<()> {
        self.open()?.clear().map_err(|e| os_error(&e))
    }

    /// Return the number of expirations since the last read or set, including missed ticks.
    ///
    /// Raises:
    ///     BlockingIOError: the timer has not expired.
    ///     ClosedError: the timer is closed.
    fn read(&self, py: Python<'_>) -> PyResult<u64> {
        let timer = self.open()?;
        let mut count = take(timer.as_raw_fd());
        // Other code may have made the descriptor blocking. Then the read waits, without the GIL.
        while let Err(e) = &count {
            match e.kind() {
                io::ErrorKind::WouldBlock if is_blocking(timer.as_raw_fd()) => {}
                io::ErrorKind::Interrupted => py.check_signals()?,
                _ => return Err(os_error(e)),
            }
            count = py.detach(|| read_count(timer.as_raw_fd()));
        }
        count.map_err(|e| os_error(&e))
    }

    fn _take(&self) -> PyResult<u64> {
        take(self.open()?.as_raw_fd()).map_err(|e| os_error(&e))
    }

    fn _begin_wait(&self, waiter: &Bound<'_, PyAny>) -> PyResult<RawFd> {
        let fd = give_out(self.open()?.as_raw_fd());
        if is_blocking(fd) {
            return Err(PyTypeError::new_err("only a nonblocking TimerFd can be iterated"));
        }
        self.reader.begin(waiter, "TimerFd")?;
        Ok(fd)
    }

    fn _end_wait(&self, py: Python<'_>) {
        self.reader.forget(py);
    }

    /// The file descriptor's number.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(give_out(self.open()?.as_raw_fd()))
    }

    /// Close the file descriptor. This ends an `async for` over it.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        drop(self.timer.lock().take());
        self.reader.end(py)
    }

    /// Whether the timer is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.timer.lock().is_none()
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(
        signature = (_kind, _error, _traceback, /),
        text_signature = "($self, kind, error, traceback, /)"
    )]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: Py<PyAny>,
        _error: Py<PyAny>,
        _traceback: Py<PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }

    fn __aiter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().open()?;
        import(slf.py(), "pyvmm.aio")?.call_method1("AsyncReader", (slf,))
    }

    fn __repr__(&self) -> String {
        match &*self.timer.lock() {
            Some(timer) => format!("TimerFd(fileno={})", give_out(timer.as_raw_fd())),
            None => "TimerFd(closed)".into(),
        }
    }
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    let time = Duration::try_from_secs_f64(value).ok();
    // The kernel's seconds are signed.
    time.filter(|time| i64::try_from(time.as_secs()).is_ok()).ok_or_else(|| {
        // In scientific notation: 300 digits would hide the rest.
        let text = match value {
            value if value.is_nan() || value < 0.0 => {
                format!("{name}: {value:?} is not a number of seconds of at least 0")
            }
            value => format!("{name}: {value:?} seconds are too long for a timer"),
        };
        PyValueError::new_err(text)
    })
}
