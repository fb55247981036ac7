//! The only place where the loop and the vCPU threads enter Python. No Rust lock is held here.

use std::time::{Duration, Instant};

use event_manager::Events;
use pyo3::prelude::*;
use pyo3::{ffi, intern};

use super::batch::Ready;
use super::endpoint::Call;
use super::event_manager::PyEventManager;
use super::events::{PyEventOps, PyEvents};

/// The arguments of `process`, used again for the next event unless a callback has kept one.
#[derive(Debug)]
pub(super) struct Arguments {
    events: Py<PyEvents>,
    ops: Py<PyEventOps>,
}

impl Arguments {
    fn new(manager: &Bound<'_, PyEventManager>, events: Events) -> PyResult<Self> {
        let py = manager.py();
        Ok(Self {
            events: Py::new(py, PyEvents::happened(events))?,
            ops: Py::new(py, PyEventOps::of(manager))?,
        })
    }

    /// The batch has been delivered, or a callback has kept them: hold the manager no longer.
    pub(super) fn detach(&self) {
        self.ops.get().detach();
    }

    fn is_kept(&self) -> bool {
        // SAFETY: two live objects of ours, with the GIL held.
        unsafe { ffi::Py_REFCNT(self.events.as_ptr()) > 1 || ffi::Py_REFCNT(self.ops.as_ptr()) > 1 }
    }
}

/// Call a new subscriber's `init(ops)`. On the thread that adds it.
pub(super) fn init(
    manager: &Bound<'_, PyEventManager>,
    token: u64,
    subscriber: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let py = manager.py();
    let ops = Bound::new(py, PyEventOps::of(manager))?;
    ops.get().begin(token);
    let result = subscriber.call_method1(intern!(py, "init"), (&ops,));
    ops.get().end();
    ops.get().detach();
    result.map(drop)
}

/// Call `process(events, ops)` for what the last dispatch fetched. On the thread that turns the loop.
/// Returns how many events were dropped: their subscriber, or its interest, had gone since.
///
/// The first exception ends the delivery. What was fetched behind it is reported again by the next dispatch.
pub(super) fn deliver(manager: &Bound<'_, PyEventManager>) -> PyResult<usize> {
    let this = manager.get();
    let mut batch = this.take_batch();
    if let Some(arguments) = batch.arguments.as_ref().filter(|_| !batch.ready.is_empty()) {
        arguments.ops.get().attach(manager);
    }
    let mut dropped = 0;
    for (at, ready) in batch.ready.iter().enumerate() {
        let Some(subscriber) = this.receiver(manager.py(), ready) else {
            dropped += 1;
            continue;
        };
        if let Err(error) = process(manager, ready, &subscriber, &mut batch.arguments) {
            batch.ready.iter().skip(at + 1).for_each(|ready| this.rearm(ready));
            return Err(error);
        }
    }
    this.give_back(batch);
    make_calls(manager)?;
    Ok(dropped)
}

/// Log a callback that took longer than the threshold.
fn tell_slow(subscriber: &Bound<'_, PyAny>, took: Duration, threshold: Duration) -> PyResult<()> {
    if took <= threshold {
        return Ok(());
    }
    let callbacks = subscriber.py().import("pyvmm.callbacks")?;
    callbacks.call_method1("warn_slow", (subscriber, took.as_secs_f64())).map(drop)
}

/// Make the calls that other threads have asked for: those that were there when it began.
fn make_calls(manager: &Bound<'_, PyEventManager>) -> PyResult<()> {
    let this = manager.get();
    for _ in 0..this.waiting_calls() {
        let Some(Call { function, reply }) = this.next_call() else {
            break;
        };
        let result = function.call1(manager.py(), (manager,));
        match reply {
            Some(reply) => reply.give(result),
            None => drop(result?),
        }
    }
    Ok(())
}

fn process(
    manager: &Bound<'_, PyEventManager>,
    ready: &Ready,
    subscriber: &Py<PyAny>,
    spare: &mut Option<Arguments>,
) -> PyResult<()> {
    let py = manager.py();
    let arguments = match spare.take() {
        Some(arguments) => {
            arguments.events.get().happened_next(ready.events);
            arguments
        }
        None => Arguments::new(manager, ready.events)?,
    };
    arguments.ops.get().begin(ready.token);
    let parts = (arguments.events.bind(py), arguments.ops.bind(py));
    let watch = manager.get().slow_callback().map(|threshold| (threshold, Instant::now()));
    let result = subscriber.bind(py).call_method1(intern!(py, "process"), parts);
    arguments.ops.get().end();
    if arguments.is_kept() {
        arguments.detach();
    } else {
        *spare = Some(arguments);
    }
    let returned = result?;
    if let Some((threshold, start)) = watch {
        tell_slow(subscriber.bind(py), start.elapsed(), threshold)?;
    }
    if returned.is_none() {
        return Ok(());
    }
    match manager.get().awaiter(py) {
        Some(awaiter) => awaiter.call1(py, (returned,)).map(drop),
        None => Ok(()),
    }
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
