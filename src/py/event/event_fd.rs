//! `EventFd`: eventfd(2) as a Python object. The descriptor is shared, so that it stays open for
//! another thread's `read` during `close`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::private_numbers::{give_out, keep_private, take};
use super::queue::Drain;
use super::reader::Reader;
use crate::error::Error;
use crate::poll::{is_blocking, read_count, write_count};
use crate::py::descriptor::os_error;
use crate::py::ending::import;
use crate::py::gil_cell::GilCell;

/// A counter in the kernel, accessed through a file descriptor: eventfd(2).
///
/// Args:
///     initial: the initial count, 0 to 2^64 - 2.
///     nonblocking: if true, `read` of an empty counter and `write` to a full one raise
///         BlockingIOError; otherwise they wait.
///     semaphore: `read` takes one at a time instead of the whole count.
#[pyclass(frozen, weakref, name = "EventFd", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEventFd {
    fd: GilCell<Option<Arc<EventFd>>>,
    /// Whether its calls return at once, so that the GIL need not be released.
    nonblocking: bool,
    /// Whether so much was written that a write may have to wait, if other code has made the
    /// descriptor blocking.
    may_be_full: AtomicBool,
    /// The task that iterates it.
    reader: Reader,
}

/// Smaller writes do not fill a counter within a century.
const LARGE_COUNT: u64 = 1 << 32;

impl Drain for EventFd {
    fn take(&self) -> io::Result<u64> {
        take(self.as_raw_fd())
    }
}

impl PyEventFd {
    /// Wrap a nonblocking eventfd of the crate.
    pub(crate) fn over(fd: Arc<EventFd>) -> Self {
        give_out(fd.as_raw_fd());
        Self::of(fd, true, false)
    }

    fn of(fd: Arc<EventFd>, nonblocking: bool, may_be_full: bool) -> Self {
        let (fd, may_be_full) = (GilCell::new(Some(fd)), AtomicBool::new(may_be_full));
        Self { fd, nonblocking, may_be_full, reader: Reader::default() }
    }

    /// The crate's eventfd.
    pub(crate) fn shared(&self, py: Python<'_>) -> PyResult<Arc<EventFd>> {
        self.open(py)
    }

    fn open(&self, py: Python<'_>) -> PyResult<Arc<EventFd>> {
        self.fd.with(py, |fd| fd.clone()).ok_or_else(closed)
    }

    /// The number, for the binding's own use.
    pub(super) fn number(&self, py: Python<'_>) -> Option<RawFd> {
        self.fd.with(py, |fd| fd.as_ref().map(AsRawFd::as_raw_fd))
    }

    pub(crate) fn as_drain(&self, py: Python<'_>) -> PyResult<Arc<dyn Drain>> {
        if !self.nonblocking {
            return Err(PyTypeError::new_err("only a nonblocking EventFd can be drained"));
        }
        Ok(self.open(py)?)
    }

    /// Make a call that returns at once.
    fn call_now<T>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&EventFd) -> io::Result<T>,
    ) -> PyResult<io::Result<T>> {
        // `close` cannot run meanwhile.
        self.fd.with(py, |fd| fd.as_deref().map(call)).ok_or_else(closed)
    }

    /// Make a call that may wait, without the GIL. After a signal, run Python's handlers and retry.
    fn call_waiting<T: Send>(
        &self,
        py: Python<'_>,
        call: impl Fn(&EventFd) -> io::Result<T> + Sync,
    ) -> PyResult<T> {
        let fd = self.open(py)?;
        loop {
            match py.detach(|| call(&fd)) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => py.check_signals()?,
                Err(e) => return Err(os_error(&e)),
                Ok(value) => return Ok(value),
            }
        }
    }
}

fn closed() -> PyErr {
    Error::closed("EventFd").into()
}

#[pymethods]
impl PyEventFd {
    #[new]
    #[pyo3(signature = (initial = 0, *, nonblocking = true, semaphore = false))]
    fn new(initial: u64, nonblocking: bool, semaphore: bool) -> PyResult<Self> {
        let flag = |on, bit| if on { bit } else { 0 };
        let flags = EFD_CLOEXEC | flag(nonblocking, EFD_NONBLOCK) | flag(semaphore, EFD_SEMAPHORE);
        let fd = EventFd::new(flags).map_err(|e| os_error(&e))?;
        if initial > 0 {
            fd.write(initial).map_err(|e| os_error(&e))?;
        }
        match nonblocking {
            true => keep_private(fd.as_raw_fd()),
            false => _ = give_out(fd.as_raw_fd()),
        }
        Ok(Self::of(Arc::new(fd), nonblocking, initial >= LARGE_COUNT))
    }

    /// Return the count and set it to zero; in semaphore mode, return 1 and subtract 1.
    ///
    /// Raises:
    ///     BlockingIOError: the count is zero and the EventFd is nonblocking.
    ///     ClosedError: the EventFd is closed.
    fn read(&self, py: Python<'_>) -> PyResult<u64> {
        if self.nonblocking {
            match self.call_now(py, |fd| take(fd.as_raw_fd()))? {
                Ok(count) => return Ok(count),
                // Other code may have made the descriptor blocking. Then the call waits.
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(os_error(&e)),
                Err(e) if !is_blocking(self.open(py)?.as_raw_fd()) => return Err(os_error(&e)),
                Err(_) => {}
            }
        }
        self.call_waiting(py, |fd| read_count(fd.as_raw_fd()))
    }

    /// Add to the count.
    ///
    /// Raises:
    ///     BlockingIOError: the count would exceed 2^64 - 2 and the EventFd is nonblocking.
    ///     OverflowError: the value is not from 0 to 2^64 - 1.
    ///     OSError: the value is 2^64 - 1, which the kernel refuses.
    ///     ClosedError: the EventFd is closed.
    #[pyo3(signature = (value = 1))]
    fn write(&self, py: Python<'_>, value: u64) -> PyResult<()> {
        if value >= LARGE_COUNT {
            // Relaxed, here and below: with the GIL held.
            self.may_be_full.store(true, Ordering::Relaxed);
        }
        let may_wait = || Ok::<_, PyErr>(is_blocking(self.open(py)?.as_raw_fd()));
        if self.nonblocking && !(self.may_be_full.load(Ordering::Relaxed) && may_wait()?) {
            return self.call_now(py, |fd| fd.write(value))?.map_err(|e| os_error(&e));
        }
        self.call_waiting(py, |fd| write_count(fd.as_raw_fd(), value))
    }

    /// The file descriptor's number.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        Ok(give_out(self.open(py)?.as_raw_fd()))
    }

    /// Close the file descriptor. This ends an `async for` over it.
    ///
    /// If another thread is waiting in `read`, the descriptor stays open until that call returns.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        drop(self.fd.with(py, Option::take));
        self.reader.end(py)
    }

    fn _take(&self, py: Python<'_>) -> PyResult<u64> {
        self.call_now(py, |fd| take(fd.as_raw_fd()))?.map_err(|e| os_error(&e))
    }

    fn _begin_wait(&self, waiter: &Bound<'_, PyAny>) -> PyResult<i32> {
        let fd = give_out(self.open(waiter.py())?.as_raw_fd());
        if !self.nonblocking || is_blocking(fd) {
            return Err(PyTypeError::new_err("only a nonblocking EventFd can be iterated"));
        }
        self.reader.begin(waiter, "EventFd")?;
        Ok(fd)
    }

    fn _end_wait(&self, py: Python<'_>) {
        self.reader.forget(py);
    }

    /// Whether the EventFd is closed.
    #[getter]
    fn closed(&self, py: Python<'_>) -> bool {
        self.fd.with(py, |fd| fd.is_none())
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
        if !slf.get().nonblocking {
            return Err(PyTypeError::new_err("only a nonblocking EventFd can be iterated"));
        }
        slf.get().open(slf.py())?;
        import(slf.py(), "pyvmm.aio")?.call_method1("AsyncReader", (slf,))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.fd.with(py, |fd| match fd {
            Some(fd) => format!("EventFd(fileno={})", give_out(fd.as_raw_fd())),
            None => "EventFd(closed)".into(),
        })
    }
}
