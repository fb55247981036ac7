//! Calls the subscribers for the events of a dispatch, then makes the due calls and the calls
//! requested by other threads. Runs on the loop's thread, with the GIL.

use std::time::Instant;

use event_manager::Events;
use pyo3::prelude::*;
use pyo3::{ffi, intern};

use super::call_later::make_due;
use super::endpoint::make_calls;
use super::events::{PyEventOps, PyEvents};
use super::manager::PyEventManager;
use super::queue::QueuedEvent;
use super::subscribers::Receiver;
use crate::hop::hop;
use crate::py::ending::import;
use crate::py::gil_cell::GilCell;
use crate::py::recorded::record_process;
use crate::py::returned::take_returned;
use crate::trace;

/// The arguments of `process`, reused for the next event unless a callback has kept one.
#[derive(Debug)]
struct Arguments {
    events: Py<PyEvents>,
    ops: Py<PyEventOps>,
}

impl Arguments {
    fn new(py: Python<'_>, events: Events) -> PyResult<Self> {
        Ok(Self {
            events: Py::new(py, PyEvents::happened(events))?,
            ops: Py::new(py, PyEventOps::new())?,
        })
    }

    fn is_kept(&self) -> bool {
        // SAFETY: two live objects that we own, with the GIL held.
        unsafe { ffi::Py_REFCNT(self.events.as_ptr()) > 1 || ffi::Py_REFCNT(self.ops.as_ptr()) > 1 }
    }
}

/// Spare arguments that no delivery uses.
static SPARE: GilCell<Option<Arguments>> = GilCell::new(None);

/// Call `process(events, ops)` for the fetched events, then make the due calls and the calls
/// requested by other threads. Runs on the loop's thread. Returns the number of events and due
/// calls, without the events whose subscriber or registration was removed meanwhile. The first
/// exception ends the delivery. The next dispatch reports the remaining events again.
pub(crate) fn deliver(
    manager: &Bound<'_, PyEventManager>,
    batch: &[QueuedEvent],
    fetched: usize,
) -> PyResult<usize> {
    hop!();
    let result = deliver_all(manager, batch, fetched);
    if result.is_err() && manager.get().core().check_process().is_ok() {
        manager.get().keep_calls()?;
    }
    result
}

fn deliver_all(
    manager: &Bound<'_, PyEventManager>,
    batch: &[QueuedEvent],
    fetched: usize,
) -> PyResult<usize> {
    let delivered = fetched.saturating_sub(deliver_events(manager, batch)?);
    let delivered = match manager.get().timers().take_expired() {
        // The timer's own event is not counted.
        true => delivered.saturating_sub(1) + make_due(manager)?,
        false => delivered,
    };
    make_calls(manager).map(|()| delivered)
}

/// Returns the number of events without a subscriber.
fn deliver_events(manager: &Bound<'_, PyEventManager>, batch: &[QueuedEvent]) -> PyResult<usize> {
    let mut arguments = SPARE.with(manager.py(), Option::take);
    let result = deliver_each(manager, batch, &mut arguments);
    // Outside the cell, because an iteration inside a callback may have left others.
    drop(SPARE.with(manager.py(), |spare| std::mem::replace(spare, arguments)));
    result
}

fn deliver_each(
    manager: &Bound<'_, PyEventManager>,
    batch: &[QueuedEvent],
    arguments: &mut Option<Arguments>,
) -> PyResult<usize> {
    let this = manager.get();
    let mut dropped = 0;
    let is_recorded = trace::is_recorded();
    for (at, event) in batch.iter().enumerate() {
        let result = match this.receiver(manager.py(), event) {
            // A callback written in C does not check for signals itself.
            Ok(Some(receiver)) => process(manager, event, &receiver, arguments, is_recorded)
                .and_then(|()| manager.py().check_signals()),
            Ok(None) => {
                dropped += 1;
                Ok(())
            }
            Err(error) => Err(error),
        };
        // If the callback has forked, the remaining events belong to the parent.
        if let Err(refused) = this.core().check_process() {
            return Err(result.err().unwrap_or_else(|| refused.into()));
        }
        if let Err(error) = result {
            let rest = batch.iter().skip(at + 1);
            rest.for_each(|event| this.rearm(manager.py(), event));
            return Err(error);
        }
    }
    Ok(dropped)
}

fn subscriber_name(subscriber: &Bound<'_, PyAny>) -> PyResult<String> {
    let callbacks = import(subscriber.py(), "pyvmm.callbacks")?;
    callbacks.call_method1("name_of", (subscriber,))?.extract()
}

fn process(
    manager: &Bound<'_, PyEventManager>,
    ready: &QueuedEvent,
    receiver: &Receiver<'_>,
    spare: &mut Option<Arguments>,
    is_recorded: bool,
) -> PyResult<()> {
    hop!();
    let py = manager.py();
    let subscriber = &receiver.object;
    let arguments = match spare.take() {
        Some(arguments) => arguments,
        None => Arguments::new(py, ready.events)?,
    };
    arguments.events.get().happened_next(ready.events, receiver.count);
    let parts = (arguments.events.bind(py), arguments.ops.bind(py));
    let called = is_recorded.then(Instant::now);
    let name = || subscriber_name(subscriber);
    let result = receiver.context.run(py, || {
        let returned = manager.get().stats().timed(py, name, || {
            let _call = arguments.ops.get().begin(manager, ready.token);
            subscriber.call_method1(intern!(py, "process"), parts)
        });
        if let Some(called) = called {
            record_process(ready.events, called, name);
        }
        take_returned(|py| manager.get().owners().awaiter(py), &returned?, name)
    });
    if !arguments.is_kept() {
        *spare = Some(arguments);
    }
    result
}
