//! Calls hooks for answers: with how an exit was answered, and what the guest reads or has written.
//! `hooks.rs` has them. On the thread of the vCPU that exited.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyTuple, PyType};

use super::pending_outcome::{PendingOutcome, stop_value};
use super::recorded::{name_of, recorded};
use super::returned::refuse_awaitable;
use super::vcpu::PyVcpu;
use crate::vcpu::Answer;

/// Call all hooks for answers of an exit's kind, in the order they were added, until one raises.
/// Returns whether one of them stops the run.
pub(super) fn call_all(
    functions: &Bound<'_, PyTuple>,
    vcpu: &Bound<'_, PyVcpu>,
    exit: &Bound<'_, PyAny>,
    answer: &Answer<'_>,
    pending: &PendingOutcome,
) -> PyResult<bool> {
    let shown = shown(functions.py(), answer)?;
    let mut is_stopped = false;
    for function in functions.iter_borrowed() {
        let said = recorded(|| name_of(&function), || function.call1((vcpu, exit, &shown)))?;
        if said.is_none() {
            continue;
        }
        refuse_awaitable(&said, || name_of(&function))?;
        let Some(value) = stop_value(&said)? else {
            let class = said.get_type();
            let text = format!(
                "a hook of an answer returns None or a Stop, not {}: the guest has its answer",
                class.name()?
            );
            return Err(PyTypeError::new_err(text));
        };
        // Only the first value ends the run. If the guest has ended, none does.
        if !answer.ends_run && !is_stopped {
            pending.stop_here(value);
        }
        is_stopped = true;
    }
    Ok(is_stopped)
}

/// The answer as the hooks see it.
fn shown<'py>(py: Python<'py>, answer: &Answer<'_>) -> PyResult<Bound<'py, PyAny>> {
    static ANSWER: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    static ANSWERED_BY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let by = ANSWERED_BY.import(py, "pyvmm.exits", "AnsweredBy")?.call1((answer.by.name(),))?;
    let data = answer.data.as_ref().map(|data| PyBytes::new(py, data));
    ANSWER.import(py, "pyvmm.exits", "Answer")?.call1((by, data, answer.device, answer.ends_run))
}
