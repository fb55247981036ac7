//! Converts the crate's error type to the exception classes of `pyvmm.exceptions`.

use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyTuple};

use super::ending::import;
use super::enter::attach;
use crate::error::{Error, ErrorKind};

/// The class of a kind, and whether it is an `OSError` that takes an errno.
fn class_of(kind: ErrorKind) -> (&'static str, bool) {
    match kind {
        ErrorKind::Config => ("ConfigError", false),
        ErrorKind::Unavailable => ("KvmUnavailableError", true),
        ErrorKind::Kvm => ("KvmError", true),
        ErrorKind::Memory => ("GuestMemoryError", false),
        ErrorKind::Boot => ("BootError", false),
        ErrorKind::State => ("StateError", false),
        ErrorKind::Closed => ("ClosedError", false),
        ErrorKind::Event => ("EventError", true),
        ErrorKind::Io => ("StreamError", true),
        ErrorKind::Snapshot => ("SnapshotError", false),
        ErrorKind::Timeout => ("WaitTimeoutError", false),
    }
}

fn exception(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let (name, is_os_error) = class_of(error.kind);
    let class = import(py, "pyvmm.exceptions")?.getattr(name)?;
    let text = error.to_string();
    let arguments = match error.errno {
        Some(errno) if is_os_error => (errno, text).into_pyobject(py)?,
        _ => PyTuple::new(py, [text])?,
    };
    let keywords = [("at", Some(error.at.as_str())), ("hint", error.hint)].into_py_dict(py)?;
    Ok(PyErr::from_value(class.call(arguments, Some(&keywords))?))
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        attach(|py| exception(py, &error).unwrap_or_else(|failure| failure))
    }
}
