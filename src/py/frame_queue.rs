//! `FrameQueue` for Python: the frames of `PythonNet`.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use crate::net::{Frame, FrameQueue, NetBackend};

/// The frames between a guest and a program, in two bounded queues. `PythonNet` has one.
#[pyclass(frozen, weakref, eq, hash, name = "FrameQueue", module = "pyvmm")]
#[derive(Debug)]
pub struct PyFrameQueue(pub(super) Arc<FrameQueue>);

impl PartialEq for PyFrameQueue {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::hash::Hash for PyFrameQueue {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

#[pymethods]
impl PyFrameQueue {
    /// With room for this many frames in each direction.
    #[new]
    fn new(most: usize) -> PyResult<Self> {
        Ok(Self(FrameQueue::new(most)?))
    }

    /// Give the guest a frame. False if there is no room for it.
    fn send(&self, py: Python<'_>, frame: PyBackedBytes) -> PyResult<bool> {
        if !(Frame::SHORTEST..=Frame::LONGEST).contains(&frame.len()) {
            let text = format!("frame: {} bytes are no Ethernet frame", frame.len());
            return Err(PyValueError::new_err(text));
        }
        Ok(py.detach(|| self.0.give(&frame)))
    }

    /// Take at most this many frames of the guest.
    fn receive<'py>(&self, py: Python<'py>, most: usize) -> Vec<Bound<'py, PyBytes>> {
        let frames = py.detach(|| self.0.take(most));
        frames.iter().map(|frame| PyBytes::new(py, frame)).collect()
    }

    /// Readable while frames of the guest wait.
    fn fileno(&self) -> RawFd {
        self.0.fd()
    }

    /// How many frames were dropped.
    #[getter]
    fn dropped(&self) -> u64 {
        self.0.dropped()
    }
}
