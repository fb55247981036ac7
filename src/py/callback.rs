//! The only place where the loop and the vCPU threads enter Python. No Rust lock is held here.

use std::time::{Duration, Instant};

use event_manager::Events;
use pyo3::prelude::*;
use pyo3::{ffi, intern};

use super::batch::Ready;
use super::endpoint::Call;
use super::event_manager::PyEventManager;
use super::events::{PyEventOps, PyEvents};
use super::subscribers::Receiver;

/// The arguments of `process`, used again for the next event unless a callback has kept one.
#[derive(Debug)]
pub(super) struct Arguments {
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
        // SAFETY: two live objects of ours, with the GIL held.
        unsafe { ffi::Py_REFCNT(self.events.as_ptr()) > 1 || ffi::Py_REFCNT(self.ops.as_ptr()) > 1 }
    }
}

/// What a delivery needs, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct Delivery {
    ready: Vec<Ready>,
    arguments: Option<Arguments>,
}

/// Call a new subscriber's `init(ops)`. On the thread that adds it.
pub(super) fn init(
    manager: &Bound<'_, PyEventManager>,
    token: u64,
    subscriber: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let py = manager.py();
    let ops = Bound::new(py, PyEventOps::new())?;
    let result = {
        let _call = ops.get().begin(manager, token);
        subscriber.call_method1(intern!(py, "init"), (&ops,))
    };
    result.map(drop)
}

/// Call `process(events, ops)` for what the last dispatch fetched, then make the calls that other threads have asked for.
/// On the thread that turns the loop.
/// Returns how many events were dropped: their subscriber, or its interest, had gone since.
///
/// The first exception ends the delivery. What was fetched behind it is reported again by the next dispatch.
pub(super) fn deliver(
    manager: &Bound<'_, PyEventManager>,
    delivery: &mut Delivery,
) -> PyResult<usize> {
    let result =
        deliver_events(manager, delivery).and_then(|dropped| make_calls(manager).map(|()| dropped));
    if result.is_err() {
        manager.get().keep_calls()?;
    }
    result
}

fn deliver_events(manager: &Bound<'_, PyEventManager>, delivery: &mut Delivery) -> PyResult<usize> {
    let this = manager.get();
    let Delivery { ready, arguments } = delivery;
    ready.clear();
    this.swap_fetched(ready);
    let mut dropped = 0;
    for (at, event) in ready.iter().enumerate() {
        let result = match this.receiver(manager.py(), event) {
            Ok(Some(receiver)) => process(manager, event, &receiver, arguments),
            Ok(None) => {
                dropped += 1;
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            ready.iter().skip(at + 1).for_each(|event| this.rearm(event));
            return Err(error);
        }
    }
    Ok(dropped)
}

/// Note a callback that took the longest so far, and log one that took longer than the threshold.
fn time(
    manager: &PyEventManager,
    subscriber: &Bound<'_, PyAny>,
    took: Duration,
    threshold: Duration,
) -> PyResult<()> {
    let is_slowest = manager.slowest_so_far() < took;
    if !is_slowest && took <= threshold {
        return Ok(());
    }
    let callbacks = subscriber.py().import("pyvmm.callbacks")?;
    let name: String = callbacks.call_method1("name_of", (subscriber,))?.extract()?;
    if took > threshold {
        callbacks.call_method1("warn_slow", (&name, took.as_secs_f64()))?;
    }
    if is_slowest {
        manager.note_slowest(took, name);
    }
    Ok(())
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
    receiver: &Receiver,
    spare: &mut Option<Arguments>,
) -> PyResult<()> {
    let py = manager.py();
    let subscriber = &receiver.object;
    let arguments = match spare.take() {
        Some(arguments) => arguments,
        None => Arguments::new(py, ready.events)?,
    };
    arguments.events.get().happened_next(ready.events, receiver.count);
    let parts = (arguments.events.bind(py), arguments.ops.bind(py));
    let watch = manager.get().slow_callback().map(|threshold| (threshold, Instant::now()));
    let result = {
        let _call = arguments.ops.get().begin(manager, ready.token);
        subscriber.bind(py).call_method1(intern!(py, "process"), parts)
    };
    if !arguments.is_kept() {
        *spare = Some(arguments);
    }
    let returned = result?;
    if let Some((threshold, start)) = watch {
        time(manager.get(), subscriber.bind(py), start.elapsed(), threshold)?;
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
        let manager = manager.bind(py);
        manager.get().with_delivery(|delivery| deliver(manager, delivery))?;
        py.check_signals()
    })
}

/// Call an exit handler's `kick()`. On the thread of the vCPU whose guest has ended.
pub(super) fn kick(handler: &Py<PyAny>) -> PyResult<()> {
    Python::attach(|py| handler.bind(py).call_method0(intern!(py, "kick")).map(drop))
}

/// Tell a function how far a long call has come, and run Python's signal handlers. On the thread of that call.
pub(super) fn progress(function: Option<&Py<PyAny>>, done: u64, total: u64) -> PyResult<()> {
    Python::attach(|py| {
        if let Some(function) = function {
            function.bind(py).call1((done, total))?;
        }
        py.check_signals()
    })
}
