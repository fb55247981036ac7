//! File descriptors: the descriptor of a Python object, and the kernel's errors as exceptions.

use std::io;
use std::os::fd::RawFd;

use pyo3::exceptions::{PyOSError, PyOverflowError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBool;

use super::ending::guard_thread;
use crate::error::{Error, ErrorKind};

/// The file descriptor of an int or of an object with `fileno()`.
pub(super) fn descriptor(source: &Bound<'_, PyAny>) -> PyResult<RawFd> {
    guard_thread();
    if source.is_instance_of::<PyBool>() {
        // Python 3.13 warns, and older versions take it for 0 or 1.
        let detail = format!("{} is not a file descriptor, but a bool", source.repr()?);
        return Err(Error::new(ErrorKind::Config, "source", detail).into());
    }
    // SAFETY: a borrowed reference to a live object, with the GIL held.
    let fd = unsafe { ffi::PyObject_AsFileDescriptor(source.as_ptr()) };
    if fd >= 0 {
        return Ok(fd);
    }
    let py = source.py();
    let error = PyErr::fetch(py);
    if error.is_instance_of::<PyOverflowError>(py) || error.is_instance_of::<PyValueError>(py) {
        let detail = format!("{} is not an open file descriptor", source.repr()?);
        return Err(Error::new(ErrorKind::Config, "source", detail).into());
    }
    Err(error)
}

/// Python chooses the class by the errno: `BlockingIOError` for an empty counter.
pub(super) fn os_error(error: &io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(errno) => PyOSError::new_err((errno, error.to_string())),
        None => PyOSError::new_err(error.to_string()),
    }
}
