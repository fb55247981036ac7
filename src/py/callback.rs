//! The only place where the loop and the vCPU threads enter Python. No Rust lock is held here.

use pyo3::intern;
use pyo3::prelude::*;

use event_manager::SubscriberId;

use super::event_manager::PyEventManager;
use super::events::{PyEventOps, PyEvents};

/// Call a new subscriber's `init(ops)`. On the thread that adds it.
pub(super) fn init(
    manager: &Bound<'_, PyEventManager>,
    token: u64,
    id: SubscriberId,
    subscriber: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let py = manager.py();
    let ops = Bound::new(py, PyEventOps::new(manager.clone().unbind(), token, id))?;
    let result = subscriber.call_method1(intern!(py, "init"), (&ops,));
    ops.get().end();
    result.map(drop)
}

/// Call `process(events, ops)` for what the last dispatch fetched. On the thread that turns the loop.
/// Returns how many events were dropped: their subscriber, or its interest, had gone since.
///
/// The first exception ends the delivery. What was fetched behind it is reported again by the next dispatch.
pub(super) fn deliver(manager: &Bound<'_, PyEventManager>) -> PyResult<usize> {
    let this = manager.get();
    let mut dropped = 0;
    let mut fetched = this.take_ready().into_iter();
    while let Some(ready) = fetched.next() {
        let Some((subscriber, id)) = this.receiver(manager.py(), &ready) else {
            dropped += 1;
            continue;
        };
        let events = PyEvents::happened(ready.events);
        if let Err(error) = process(manager, ready.token, id, &subscriber, events) {
            fetched.for_each(|ready| this.rearm(&ready));
            return Err(error);
        }
    }
    Ok(dropped)
}

fn process(
    manager: &Bound<'_, PyEventManager>,
    token: u64,
    id: SubscriberId,
    subscriber: &Py<PyAny>,
    events: PyEvents,
) -> PyResult<()> {
    let py = manager.py();
    let ops = Bound::new(py, PyEventOps::new(manager.clone().unbind(), token, id))?;
    let events = Bound::new(py, events)?;
    let result = subscriber
        .bind(py)
        .call_method1(intern!(py, "process"), (events, &ops));
    ops.get().end();
    result.map(drop)
}

/// What a machine's run does after each turn: deliver events, then run Python's signal handlers.
pub(super) fn between_turns(manager: &Py<PyEventManager>) -> PyResult<()> {
    Python::attach(|py| {
        deliver(manager.bind(py))?;
        py.check_signals()
    })
}

/// Call an exit handler's `kick()`. On the thread of the vCPU whose guest has ended.
pub(super) fn kick(handler: &Py<PyAny>) -> PyResult<()> {
    Python::attach(|py| handler.bind(py).call_method0(intern!(py, "kick")).map(drop))
}
