//! Handles the results of callbacks, which are usually None. A coroutine is passed to the run that
//! can await it, or is refused.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyFloat, PyInt, PyString};

use super::ending::import;

/// Whether a value does nothing unless it is awaited or iterated. The check is quick for usual
/// values.
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
    // Python code must determine which generators are coroutines.
    Ok(class.hasattr(intern!(py, "__await__"))?
        || class.hasattr(intern!(py, "gi_frame"))?
        || class.hasattr(intern!(py, "ag_frame"))?)
}

/// Pass the result of a loop's callback to the asyncio loop that awaits it, if there is one.
/// An error if there is none and the value would never run.
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
