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
use super::wakeup;
use crate::event::EventManager;

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

impl Delivery {
    /// Room for the events of the next delivery.
    pub(super) fn emptied(&mut self) -> &mut Vec<Ready> {
        self.ready.clear();
        &mut self.ready
    }
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

/// Call `process(events, ops)` for what was fetched, then make the calls that other threads have asked for.
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
            let rest = ready.iter().skip(at + 1);
            rest.for_each(|event| this.rearm(manager.py(), event));
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
    let is_slowest = manager.watch().is_slowest(took);
    if !is_slowest && took <= threshold {
        return Ok(());
    }
    let callbacks = subscriber.py().import("pyvmm.callbacks")?;
    let name: String = callbacks.call_method1("name_of", (subscriber,))?.extract()?;
    if took > threshold {
        callbacks.call_method1("warn_slow", (&name, took.as_secs_f64()))?;
    }
    if is_slowest {
        manager.watch().note_slowest(took, name);
    }
    Ok(())
}

/// Make the calls that other threads have asked for: those that were there when it began.
fn make_calls(manager: &Bound<'_, PyEventManager>) -> PyResult<()> {
    let this = manager.get();
    for _ in 0..this.calls().waiting() {
        let Some(Call { function, reply }) = this.calls().pop() else {
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
    receiver: &Receiver<'_>,
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
    let watch = manager.get().watch().slow_callback().map(|threshold| (threshold, Instant::now()));
    let result = {
        let _call = arguments.ops.get().begin(manager, ready.token);
        subscriber.call_method1(intern!(py, "process"), parts)
    };
    if !arguments.is_kept() {
        *spare = Some(arguments);
    }
    let returned = result?;
    if let Some((threshold, start)) = watch {
        time(manager.get(), subscriber, start.elapsed(), threshold)?;
    }
    if returned.is_none() {
        return Ok(());
    }
    match manager.get().awaiter(py) {
        Some(awaiter) => awaiter.call1(py, (returned,)).map(drop),
        None => Ok(()),
    }
}

/// Wait until this time at most and dispatch; returns how many events were fetched: none also after a kick or a signal.
/// Without the GIL.
pub(super) fn wait(core: &EventManager, deadline: Option<Instant>) -> PyResult<usize> {
    let fetched =
        wakeup::wait(deadline, |until, interrupt| core.run_until(until, interrupt).transpose())?;
    Ok(fetched.unwrap_or(Ok(0))?)
}

/// A turn of a machine's loop: wait until this time at most, dispatch, deliver, and run Python's signal handlers. Without
/// the GIL.
pub(super) fn turn(manager: &Py<PyEventManager>, deadline: Option<Instant>) -> PyResult<()> {
    let core = manager.get().core();
    let fetched = match core.try_dispatch(|| ())? {
        Some(count) => count,
        None => wait(core, deadline)?,
    };
    Python::attach(|py| {
        PyEventManager::deliver_fetched(manager.bind(py), fetched)?;
        py.check_signals()
    })
}

/// Call an exit handler's `kick()`. On the thread of the vCPU whose guest has ended.
pub(super) fn kick(handler: &Py<PyAny>) -> PyResult<()> {
    Python::attach(|py| handler.bind(py).call_method0(intern!(py, "kick")).map(drop))
}
