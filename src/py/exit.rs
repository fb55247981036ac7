//! `Exit` and `VmRunState` for Python. Both classes are written in Python.

use std::collections::HashMap;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::IntoPyDict;

use super::ending::{guard_thread, import};
use crate::exit_handler::{Exception, Exit, ExitReason};
use crate::vcpu::VmRunState;

/// A `pyvmm.Exit`.
pub(super) fn to_python<'py>(py: Python<'py>, exit: &Exit) -> PyResult<Bound<'py, PyAny>> {
    static EXIT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    guard_thread();
    let reason = reason(py, exit.reason)?;
    let class = EXIT.import(py, "pyvmm.exits", "Exit")?;
    let (code, fault) = (exit.code, exit.fault.as_deref());
    let Some(exception) = &exit.exception else {
        return class.call1((reason, code, exit.vcpu, fault));
    };
    let Exception { vector, error_code, cr2, rip, symbol } = exception;
    let value = None::<u64>;
    class.call1((reason, code, exit.vcpu, fault, value, vector, error_code, cr2, rip, symbol))
}

/// A member of `pyvmm.ExitReason`, looked up by its name once: a call of the class takes as long as
/// the rest of an exit.
fn reason(py: Python<'_>, reason: ExitReason) -> PyResult<&Bound<'_, PyAny>> {
    static REASONS: PyOnceLock<HashMap<String, Py<PyAny>>> = PyOnceLock::new();
    let reasons = REASONS.get_or_try_init(py, || {
        let class = import(py, "pyvmm.exits")?.getattr("ExitReason")?;
        let named = |member: PyResult<Bound<'_, PyAny>>| {
            let member = member?;
            Ok::<_, PyErr>((member.extract()?, member.unbind()))
        };
        class.try_iter()?.map(named).collect()
    })?;
    let unknown = || PyValueError::new_err(format!("ExitReason has no {}", reason.name()));
    reasons.get(reason.name()).map(|member| member.bind(py)).ok_or_else(unknown)
}

/// A `pyvmm.Exit` for a run ended by a callback's `Stop(value)`, or by the text of `stop_at`.
pub(super) fn stopped<'py>(
    py: Python<'py>,
    vcpu: Option<u64>,
    value: &Py<PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let exit = Exit { vcpu, ..Exit::new(ExitReason::Stopped) };
    let keywords = [("value", value)].into_py_dict(py)?;
    to_python(py, &exit)?.call_method("_replace", (), Some(&keywords))
}

/// A `pyvmm.VmRunState`.
pub(super) fn state(py: Python<'_>, state: VmRunState) -> PyResult<Bound<'_, PyAny>> {
    static STATE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    guard_thread();
    STATE.import(py, "pyvmm.exits", "VmRunState")?.call1((state.name(),))
}

/// Convert seconds to a duration. None and infinity mean no limit.
pub(super) fn timeout(seconds: Option<f64>) -> PyResult<Option<Duration>> {
    match seconds {
        None => Ok(None),
        Some(seconds) if seconds.is_nan() || seconds < 0.0 => Err(PyValueError::new_err(format!(
            "timeout: {seconds:?} is not a number of seconds of at least 0"
        ))),
        // A value that does not fit is longer than any run.
        Some(seconds) => Ok(Duration::try_from_secs_f64(seconds).ok()),
    }
}
