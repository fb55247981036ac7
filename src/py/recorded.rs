//! What a callable is called, and its calls as spans of a trace.

use std::time::Instant;

use event_manager::Events;
use pyo3::intern;
use pyo3::prelude::*;

use crate::event::record_event;
use crate::trace::{is_recorded, record};

/// A callable that does not say its name.
const UNNAMED: &str = "callback";

/// Make a call of the program's code, and record it where this thread is recorded. The GIL is held.
pub(super) fn recorded<T>(name: impl FnOnce() -> PyResult<String>, call: impl FnOnce() -> T) -> T {
    if !is_recorded() {
        return call();
    }
    let began = Instant::now();
    let result = call();
    let ended = Instant::now();
    // Asking for a name may run the program's code, too, and what that raises is nothing to the
    // run.
    let name = name().unwrap_or_else(|_| UNNAMED.to_owned());
    record("callback", &name, (began, ended), &[]);
    result
}

/// Record that a subscriber has been called for an event. Apart from the call, which is made far
/// more often unrecorded.
#[cold]
pub(super) fn record_process(
    events: Events,
    called: Instant,
    name: impl FnOnce() -> PyResult<String>,
) {
    let returned = Instant::now();
    // Before the callback: what begins at the same time is its child.
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
