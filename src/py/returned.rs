//! What callbacks return: usually None. A coroutine goes to the run that can await it, or is
//! refused.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyFloat, PyInt, PyString};

use super::ending::import;

/// Whether a value does nothing unless it is awaited or iterated. The usual values are found
/// quickly.
fn may_wait(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    if value.is_none()
        || value.is_exact_instance_of::<PyInt>()
        || value.is_exact_instance_of::<PyBool>()
        || value.is_exact_instance_of::<PyBytes>()
        || value.is_exact_instance_of::<PyString>()
        || value.is_exact_instance_of::<PyFloat>()
    {
        return Ok(false);
    }
    let (py, class) = (value.py(), value.get_type());
    // Of generators Python code has to tell which are coroutines.
    Ok(class.hasattr(intern!(py, "__await__"))?
        || class.hasattr(intern!(py, "gi_frame"))?
        || class.hasattr(intern!(py, "ag_frame"))?)
}

/// Have what a callback of a loop has returned awaited, where an asyncio loop is there for it.
///
/// An error where none is and the value would never run.
pub(super) fn take_returned(
    awaiter: impl FnOnce(Python<'_>) -> Option<Py<PyAny>>,
    value: &Bound<'_, PyAny>,
    name: impl FnOnce() -> PyResult<String>,
) -> PyResult<()> {
    if !may_wait(value)? {
        return Ok(());
    }
    let py = value.py();
    let aio = import(py, "pyvmm.aio")?;
    aio.call_method1("take_returned", (awaiter(py), value, name()?)).map(drop)
}

/// Refuse a coroutine of a callback that cannot be awaited.
pub(super) fn refuse_awaitable(
    value: &Bound<'_, PyAny>,
    name: impl FnOnce() -> PyResult<String>,
) -> PyResult<()> {
    if !may_wait(value)? {
        return Ok(());
    }
    import(value.py(), "pyvmm.aio")?.call_method1("refuse_awaitable", (value, name()?)).map(drop)
}
