//! `NetworkPort` for Python: sends and receives frames, and sets the conditions of its links.

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use pyo3::exceptions::{PyBlockingIOError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{IntoPyDict, PyBytes, PyDict};

use super::ending::import;
use super::event::Reader;
use super::exit;
use super::network_conditions::{Change, to_python};
use super::owned::Owned;
use super::wakeup;
use crate::error::{Error, ErrorKind, Result};
use crate::limit::deadline_of;
use crate::net::Capture;
use crate::net::switch::{Direction, Port, PortCounts};
use crate::poll::wait_for_either;

/// A place where a machine or a program is connected to a `Network`. `Network.port` makes it.
///
/// It is closed when neither a machine nor the program has it any more. It can be used on any
/// thread.
#[pyclass(frozen, weakref, eq, hash, name = "NetworkPort", module = "pyvmm")]
#[derive(Debug)]
pub struct PyNetworkPort {
    port: Owned<Arc<Port>>,
    /// The task that iterates it.
    reader: Reader,
}

impl PartialEq for PyNetworkPort {
    fn eq(&self, other: &Self) -> bool {
        let ports = (self.port.known(), other.port.known());
        matches!(ports, (Some(one), Some(other)) if Arc::ptr_eq(one, other))
    }
}

impl std::hash::Hash for PyNetworkPort {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.port.known().map(Arc::as_ptr).hash(state);
    }
}

impl PyNetworkPort {
    pub(super) fn over(port: Arc<Port>) -> Self {
        Self { port: Owned::new("network port", port), reader: Reader::default() }
    }

    pub(super) fn core(&self) -> Result<&Arc<Port>> {
        self.port.get()
    }

    /// # Errors
    /// [`ErrorKind::Closed`] if it is closed.
    fn open(&self) -> Result<&Arc<Port>> {
        let port = self.core()?;
        if port.is_closed() { Err(Error::closed("port")) } else { Ok(port) }
    }

    /// Take a frame that has arrived.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let port = self.core()?;
        if port.is_claimed() {
            let detail = format!("a machine uses the port {:?}, and takes its frames", port.name());
            return Err(Error::new(ErrorKind::State, "receive", detail).into());
        }
        match py.detach(|| port.receive()) {
            Some(frame) => Ok(Some(PyBytes::new(py, &frame))),
            None => self.open().map(|_| None).map_err(PyErr::from),
        }
    }
}

/// A new file for frames.
pub(super) fn recording(path: Option<PathBuf>) -> Result<Option<Arc<Capture>>> {
    Ok(path.map(|path| Capture::create(&path)).transpose()?.map(Arc::new))
}

/// The directions of "in", "out" and "both".
fn directions(name: &str) -> PyResult<&'static [Direction]> {
    match name {
        "both" => Ok(&[Direction::Out, Direction::In]),
        "out" => Ok(&[Direction::Out]),
        "in" => Ok(&[Direction::In]),
        _ => {
            let text = format!("direction: {name:?} is not \"in\", \"out\" or \"both\"");
            Err(PyValueError::new_err(text))
        }
    }
}

fn no_frame() -> PyErr {
    PyBlockingIOError::new_err((libc::EAGAIN, "no frame has arrived"))
}

#[pymethods]
impl PyNetworkPort {
    /// Its name, which is its network's only one.
    #[getter]
    fn name(&self) -> PyResult<&str> {
        Ok(self.core()?.name())
    }

    /// Send an Ethernet frame into the network, without its checksum. It never waits.
    ///
    /// Raises:
    ///     ValueError: the frame is shorter than 14 bytes or longer than 65,553.
    ///     ClosedError: the port is closed.
    #[pyo3(text_signature = "($self, frame)")]
    fn send(&self, py: Python<'_>, frame: PyBackedBytes) -> PyResult<()> {
        let port = self.open()?;
        if !Port::is_length(frame.len()) {
            let text = format!("frame: {} bytes are no Ethernet frame", frame.len());
            return Err(PyValueError::new_err(text));
        }
        py.detach(|| port.send(&frame));
        Ok(())
    }

    /// Wait for the next frame, and return it.
    ///
    /// Raises:
    ///     WaitTimeoutError: no frame arrived within `timeout` seconds; with 0, no frame was there.
    ///     StateError: a machine uses the port.
    ///     ClosedError: the port is closed.
    #[pyo3(signature = (timeout = None))]
    fn receive<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyBytes>> {
        let (deadline, fd) = (deadline_of(exit::timeout(timeout)?), self.core()?.as_raw_fd());
        let wait = |until, interrupt: Option<RawFd>| {
            let ready = wait_for_either([fd, interrupt.unwrap_or(-1)], until);
            ready.is_ok_and(|[frame, _]| frame).then_some(())
        };
        loop {
            if let Some(frame) = self.take(py)? {
                return Ok(frame);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let detail = "no frame arrived within the time limit";
                return Err(Error::new(ErrorKind::Timeout, "receive", detail).into());
            }
            py.detach(|| wakeup::wait(deadline, wait))?;
            py.check_signals()?;
        }
    }

    /// Record the frames that the port sends and takes into a new pcap file, which Wireshark opens.
    ///
    /// Frames that are lost on their way to the port are not in it. None ends the recording, as
    /// does another path.
    ///
    /// Raises:
    ///     StreamError: the file cannot be written.
    ///     ClosedError: the port is closed.
    fn capture(&self, py: Python<'_>, path: Option<PathBuf>) -> PyResult<()> {
        let port = self.open()?;
        Ok(py.detach(|| port.capture(recording(path)?))?)
    }

    /// Change the conditions of the frames that this port sends and gets, for any other port.
    ///
    /// What is not given stays as it is. docs/network.md describes each condition, and how those of
    /// both ports and of `Network.set_link` add up.
    ///
    /// Args:
    ///     direction: "out" for the frames that it sends, "in" for those that it gets, or "both".
    ///     delay: seconds.
    ///     jitter: the delay varies by this many seconds, in both directions.
    ///     loss: the probability that a frame is lost.
    ///     duplicate: the probability that a frame arrives twice.
    ///     reorder: the probability that the next frame overtakes a frame.
    ///     bandwidth: bits per second; 0 means no limit.
    ///     backlog: how many seconds a frame may wait for bandwidth before it is dropped.
    ///
    /// Raises:
    ///     ConfigError: a value is out of range. Nothing is changed.
    ///     ClosedError: the port is closed.
    #[pyo3(
        signature = (direction = "both", **conditions),
        text_signature = "($self, direction='both', *, delay=None, jitter=None, loss=None, \
                          duplicate=None, reorder=None, bandwidth=None, backlog=None)"
    )]
    fn set(
        &self,
        py: Python<'_>,
        direction: &str,
        conditions: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let (port, directions) = (self.open()?, directions(direction)?);
        let change = Change::from_python(conditions)?;
        Ok(py.detach(|| port.set(directions, |conditions| change.apply(conditions)))?)
    }

    /// The conditions that `set` has set, of the frames that it sends and of those that it gets.
    ///
    /// Raises:
    ///     ClosedError: the port is closed.
    #[getter]
    fn conditions<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let port = self.core()?;
        let [out, into] = py.detach(|| port.conditions())?;
        Ok((to_python(py, &out)?, to_python(py, &into)?))
    }

    /// What has become of its frames, as a `PortStats`.
    ///
    /// Raises:
    ///     ClosedError: the port is closed.
    #[getter]
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let port = self.core()?;
        let PortCounts { sent, received } = py.detach(|| port.counts())?;
        let counts = [
            ("sent", sent.sent),
            ("sent_bytes", sent.sent_bytes),
            ("sent_lost", sent.lost),
            ("sent_over_bandwidth", sent.over_bandwidth),
            ("sent_malformed", sent.malformed),
            ("sent_unclaimed", sent.unclaimed),
            ("sent_forwarded", sent.forwarded),
            ("addressed", received.addressed),
            ("duplicated", received.duplicated),
            ("received", received.received),
            ("received_bytes", received.received_bytes),
            ("reordered", received.reordered),
            ("lost", received.lost),
            ("over_bandwidth", received.over_bandwidth),
            ("partitioned", received.partitioned),
            ("overflowed", received.overflowed),
            ("discarded", received.discarded),
            ("queued", received.queued),
        ];
        let class = import(py, "pyvmm.network")?.getattr("PortStats")?;
        class.call((), Some(&counts.into_py_dict(py)?))
    }

    /// A file descriptor that is readable while a frame is there, or the port is closed.
    ///
    /// It is only to wait for: `receive` takes the frame.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.open()?.as_raw_fd())
    }

    /// Disconnect the port from its network, also if a machine uses it.
    ///
    /// Frames on their way to it are dropped. This ends an `async for` over it.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let port = self.core()?;
        py.detach(|| port.close());
        self.reader.end(py)
    }

    /// Whether the port is closed.
    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(self.core()?.is_closed())
    }

    fn _take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.take(py)?.ok_or_else(no_frame)
    }

    fn _begin_wait(&self, waiter: &Bound<'_, PyAny>) -> PyResult<RawFd> {
        let fd = self.open()?.as_raw_fd();
        self.reader.begin(waiter, "NetworkPort")?;
        Ok(fd)
    }

    fn _end_wait(&self, py: Python<'_>) {
        self.reader.forget(py);
    }

    fn __aiter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().open()?;
        import(slf.py(), "pyvmm.aio")?.call_method1("AsyncReader", (slf,))
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

    fn __repr__(&self) -> String {
        match self.core() {
            Ok(port) if port.is_closed() => "NetworkPort(closed)".into(),
            Ok(port) => format!("NetworkPort({:?})", port.name()),
            Err(_) => "NetworkPort(unreachable)".into(),
        }
    }
}
