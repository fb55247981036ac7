//! `EventFd`: eventfd(2) as a Python object. The descriptor is shared, so that a close while another thread
//! reads leaves that read its descriptor.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::attached::Attached;
use super::batch::Drain;
use super::ending::import;

/// A counter that the kernel keeps behind a file descriptor: eventfd(2).
///
/// Args:
///     initial: the count it starts with, 0 to 2^64 - 2.
///     nonblocking: `read` of an empty counter and `write` to a full one raise BlockingIOError; else they wait.
///     semaphore: `read` takes one at a time instead of all.
#[pyclass(frozen, weakref, name = "EventFd", module = "pyvmm")]
#[derive(Debug)]
pub struct PyEventFd {
    fd: Attached<Option<Arc<EventFd>>>,
    /// Its calls return at once: the GIL is not worth letting go.
    nonblocking: bool,
}

impl Drain for EventFd {
    fn take(&self) -> io::Result<u64> {
        self.read()
    }
}

impl PyEventFd {
    /// Over a nonblocking one of the crate's.
    pub(super) fn over(fd: Arc<EventFd>) -> Self {
        Self { fd: Attached::new(Some(fd)), nonblocking: true }
    }

    /// The crate's eventfd.
    pub(super) fn shared(&self, py: Python<'_>) -> PyResult<Arc<EventFd>> {
        self.open(py)
    }

    fn open(&self, py: Python<'_>) -> PyResult<Arc<EventFd>> {
        self.fd.with(py, |fd| fd.clone()).ok_or_else(closed)
    }

    pub(super) fn as_drain(&self, py: Python<'_>) -> PyResult<Arc<dyn Drain>> {
        if !self.nonblocking {
            return Err(PyTypeError::new_err("only a nonblocking EventFd can be drained"));
        }
        Ok(self.open(py)?)
    }

    /// Call; if it may wait, without the GIL. After a signal, run Python's handlers and call again.
    fn call<T: Send>(
        &self,
        py: Python<'_>,
        call: impl Fn(&EventFd) -> io::Result<T> + Sync,
    ) -> PyResult<T> {
        if self.nonblocking {
            // The call returns at once, and no close comes meanwhile.
            return self.fd.with(py, |fd| match fd.as_deref() {
                Some(fd) => call(fd).map_err(|e| os_error(&e)),
                None => Err(closed()),
            });
        }
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
    PyValueError::new_err("this EventFd is closed")
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
        Ok(Self { fd: Attached::new(Some(Arc::new(fd))), nonblocking })
    }

    /// Take the count, or one in semaphore mode.
    ///
    /// Raises:
    ///     BlockingIOError: the count is zero and the EventFd is nonblocking.
    ///     ValueError: it is closed.
    fn read(&self, py: Python<'_>) -> PyResult<u64> {
        self.call(py, EventFd::read)
    }

    /// Add to the count.
    ///
    /// Raises:
    ///     BlockingIOError: the count would pass 2^64 - 2 and the EventFd is nonblocking.
    ///     OverflowError: the value is not from 0 to 2^64 - 1.
    ///     OSError: the value is 2^64 - 1, which the kernel refuses.
    ///     ValueError: it is closed.
    #[pyo3(signature = (value = 1))]
    fn write(&self, py: Python<'_>, value: u64) -> PyResult<()> {
        self.call(py, |fd| fd.write(value))
    }

    /// The file descriptor's number.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        Ok(self.open(py)?.as_raw_fd())
    }

    /// Close the descriptor. A `read` that waits in another thread keeps it until it returns.
    fn close(&self, py: Python<'_>) {
        drop(self.fd.with(py, Option::take));
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self, py: Python<'_>) -> bool {
        self.fd.with(py, |fd| fd.is_none())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(&self, py: Python<'_>, _kind: Py<PyAny>, _error: Py<PyAny>, _traceback: Py<PyAny>) {
        self.close(py);
    }

    fn __aiter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pyvmm.aio")?.call_method1("reads", (slf,))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.fd.with(py, |fd| match fd {
            Some(fd) => format!("EventFd(fileno={})", fd.as_raw_fd()),
            None => "EventFd(closed)".into(),
        })
    }
}

/// Python picks the class by the number: `BlockingIOError` for an empty counter.
pub(super) fn os_error(error: &io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(errno) => PyOSError::new_err((errno, error.to_string())),
        None => PyOSError::new_err(error.to_string()),
    }
}
