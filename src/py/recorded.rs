//! Names callables, and records their calls as spans of a trace.

use std::time::Instant;

use event_manager::Events;
use pyo3::intern;
use pyo3::prelude::*;

use crate::event::record_event;
use crate::trace::{is_recorded, record};

/// The name of a callable without a name.
const UNNAMED: &str = "callback";

/// Call the program's code, and record it if this thread is recorded. The GIL is held.
pub(super) fn recorded<T>(name: impl FnOnce() -> PyResult<String>, call: impl FnOnce() -> T) -> T {
    if !is_recorded() {
        return call();
    }
    let began = Instant::now();
    let result = call();
    let ended = Instant::now();
    // Getting the name may run the program's code too. Its exceptions do not affect the run.
    let name = name().unwrap_or_else(|_| UNNAMED.to_owned());
    record("callback", &name, (began, ended), &[]);
    result
}

/// Record the call of a subscriber for an event. Separate from the call, which is usually not
/// recorded.
#[cold]
pub(super) fn record_process(
    events: Events,
    called: Instant,
    name: impl FnOnce() -> PyResult<String>,
) {
    let returned = Instant::now();
    // Before the callback, because a later span with the same start time is its child.
    record_event(events, (called, Instant::now()));
    let name = name().unwrap_or_else(|_| UNNAMED.to_owned());
    record("callback", &name, (called, returned), &[]);
}

/// The name of a function, or of the class of another callable.
pub(super) fn name_of(function: &Bound<'_, PyAny>) -> PyResult<String> {
    match function.getattr_opt(intern!(function.py(), "__qualname__"))? {
        Some(name) => name.extract(),
        None => Ok(function.get_type().qualname()?.to_string()),
    }
}
