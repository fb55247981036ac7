//! The only place where the loop and the vCPU threads enter Python. No Rust lock is held here.

use std::sync::Arc;
use std::time::Instant;

use event_manager::Events;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyType};
use pyo3::{ffi, intern};

use super::attach::attach;
use super::awaiting::{refuse_awaitable, take_returned};
use super::batch::Ready;
use super::device::{PythonDevice, bytes_of};
use super::ending::{guard_thread, import};
use super::endpoint::make_calls;
use super::event_manager::PyEventManager;
use super::events::{PyEventOps, PyEvents};
use super::hooks::Hooks;
use super::raised::Raised;
use super::subscribers::Receiver;
use super::timers::Timers;
use super::trace::{name_of, record_process, recorded};
use super::vcpu_exit::PyVcpuExit;
use super::wakeup;
use crate::devices::Device as _;
use crate::event::EventManager;
use crate::process::Birthplace;
use crate::trace;
use crate::vcpu::{Cell, Data, ExitKind, VcpuExit, Verdict, current};

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
    let returned = {
        let _call = ops.get().begin(manager, token);
        subscriber.call_method1(intern!(py, "init"), (&ops,))
    };
    refuse_awaitable(&returned?, || Ok(format!("{}.init", subscriber.get_type().qualname()?)))
}

/// Call `process(events, ops)` for what was fetched, then make the calls that are due and those
/// that other threads have asked for. On the thread that turns the loop. Returns how many events
/// and calls that were due there were, of so many fetched. Those whose subscriber, or its interest,
/// had gone since are none.
///
/// The first exception ends the delivery. What was fetched behind it is reported again by the next
/// dispatch.
pub(super) fn deliver(
    manager: &Bound<'_, PyEventManager>,
    delivery: &mut Delivery,
    fetched: usize,
) -> PyResult<usize> {
    let result = deliver_all(manager, delivery, fetched);
    if result.is_err() && manager.get().core().check_process().is_ok() {
        manager.get().keep_calls()?;
    }
    result
}

fn deliver_all(
    manager: &Bound<'_, PyEventManager>,
    delivery: &mut Delivery,
    fetched: usize,
) -> PyResult<usize> {
    let delivered = fetched.saturating_sub(deliver_events(manager, delivery)?);
    let delivered = match manager.get().timers().take_expired() {
        // The timer's own event is none.
        true => delivered.saturating_sub(1) + Timers::make_due(manager)?,
        false => delivered,
    };
    make_calls(manager).map(|()| delivered)
}

fn deliver_events(manager: &Bound<'_, PyEventManager>, delivery: &mut Delivery) -> PyResult<usize> {
    let this = manager.get();
    let Delivery { ready, arguments } = delivery;
    let mut dropped = 0;
    let is_recorded = trace::is_recorded();
    for (at, event) in ready.iter().enumerate() {
        let result = match this.receiver(manager.py(), event) {
            // A callback written in C does not look for signals itself.
            Ok(Some(receiver)) => process(manager, event, &receiver, arguments, is_recorded)
                .and_then(|()| manager.py().check_signals()),
            Ok(None) => {
                dropped += 1;
                Ok(())
            }
            Err(error) => Err(error),
        };
        // A child that the callback has forked: the rest of the events is its parent's.
        if let Err(refused) = this.core().check_process() {
            return Err(result.err().unwrap_or_else(|| refused.into()));
        }
        if let Err(error) = result {
            let rest = ready.iter().skip(at + 1);
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
    ready: &Ready,
    receiver: &Receiver<'_>,
    spare: &mut Option<Arguments>,
    is_recorded: bool,
) -> PyResult<()> {
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
        let returned = manager.get().watch().timed(py, name, || {
            let _call = arguments.ops.get().begin(manager, ready.token);
            subscriber.call_method1(intern!(py, "process"), parts)
        });
        if let Some(called) = called {
            record_process(ready.events, called, name);
        }
        take_returned(manager.get(), &returned?, name)
    });
    if !arguments.is_kept() {
        *spare = Some(arguments);
    }
    result
}

/// Wait until this time at most and dispatch; returns how many events were fetched: none also after
/// a kick or a signal. Without the GIL.
pub(super) fn wait(core: &EventManager, deadline: Option<Instant>) -> PyResult<usize> {
    let fetched =
        wakeup::wait(deadline, |until, interrupt| core.wait_until(until, interrupt).transpose())?;
    Ok(fetched.unwrap_or(Ok(0))?)
}

/// A turn of a machine's loop: wait until this time at most, dispatch and deliver, or wait until
/// the thread of another machine has done so; then raise what vCPU threads have left, and run
/// Python's signal handlers. Without the GIL.
pub(super) fn turn(
    manager: &Py<PyEventManager>,
    raised: &Raised,
    deadline: Option<Instant>,
) -> PyResult<()> {
    let this = manager.get();
    let leading = this.lead().begin();
    let fetched = match &leading {
        Some(_) => wait(this.core(), deadline)?,
        None => {
            this.lead().wait(deadline);
            0
        }
    };
    attach(|py| {
        if leading.is_some() {
            PyEventManager::deliver_fetched(manager.bind(py), fetched)?;
            drop(leading);
        }
        raised.check(py)?;
        py.check_signals()
    })
}

/// Call an exit handler's `kick()`. On the thread of the vCPU whose guest has ended.
pub(super) fn kick(handler: &Py<PyAny>) -> PyResult<()> {
    on_vcpu_thread(
        |py| {
            let handler = handler.bind(py);
            let name = || Ok(format!("{}.kick", handler.get_type().qualname()?));
            refuse_awaitable(&handler.call_method0(intern!(py, "kick"))?, name).map(|()| Ok(()))
        },
        |_, error| Err(error),
    )
}

/// A vCPU thread's Python thread state, kept from one callback to the next: making one takes
/// microseconds.
struct KeptState(ffi::PyGILState_STATE, *mut ffi::PyThreadState);

impl KeptState {
    fn new() -> Self {
        guard_thread();
        // SAFETY: the interpreter is there: this is a callback of one of its objects. If it ends
        // meanwhile the thread sleeps in here. The GIL is let go again by the same thread.
        unsafe {
            let state = ffi::PyGILState_Ensure();
            Self(state, ffi::PyEval_SaveThread())
        }
    }
}

impl Drop for KeptState {
    fn drop(&mut self) {
        // SAFETY: on the thread that made it, as it ends; whoever waits for that has let the GIL
        // go.
        unsafe {
            ffi::PyEval_RestoreThread(self.1);
            ffi::PyGILState_Release(self.0);
        }
    }
}

thread_local! {
    static KEPT: KeptState = KeptState::new();
}

/// Call Python on a vCPU's thread; `otherwise` says what its exception comes to.
fn on_vcpu_thread<T>(
    call: impl FnOnce(Python<'_>) -> PyResult<T>,
    otherwise: impl FnOnce(Python<'_>, PyErr) -> T,
) -> T {
    KEPT.with(|_kept| attach(|py| call_out(py, call).unwrap_or_else(|error| otherwise(py, error))))
}

/// Make a call of the program's in the midst of native work. A child that it has forked ends where
/// it returns: the work, and what it has locked, is the parent's.
fn call_out<T>(py: Python<'_>, call: impl FnOnce(Python<'_>) -> PyResult<T>) -> PyResult<T> {
    let process = Birthplace::here();
    let result = call(py);
    if process.is_foreign() {
        leave_fork(py, result.err());
    }
    result
}

/// End the process that a callback has forked and returned in: it has this thread alone, and the
/// machine is its parent's.
fn leave_fork(py: Python<'_>, error: Option<PyErr>) -> ! {
    let callbacks = import(py, "pyvmm.callbacks");
    let left = callbacks.and_then(|callbacks| callbacks.call_method1("leave_fork", (error,)));
    // It does not return.
    std::process::exit(i32::from(left.is_err()))
}

/// What a call of a device comes to.
pub(super) enum Answer {
    /// What the guest reads.
    Bytes(Data),
    /// Nothing to say.
    Done,
    /// The run is to end.
    Stop,
}

/// Call a device on the vCPU's thread; what it raises is left for the run, with the place in a
/// note.
fn call_device(
    device: &PythonDevice,
    method: &'static str,
    offset: u64,
    call: impl FnOnce(Python<'_>) -> PyResult<Answer>,
) -> Answer {
    let name = || Ok(format!("{}.{method}", device.name()));
    on_vcpu_thread(
        |py| recorded(name, || call(py)),
        |py, error| {
            let text = format!("in {method}() at {}{}", device.place(offset), position());
            leave(py, device.raised(), error, &text);
            Answer::Stop
        },
    )
}

/// Where the vCPU of this thread stands, for a note.
fn position() -> String {
    let Some(cell) = current() else { return String::new() };
    match cell.with_vcpu(|vcpu| vcpu.general()) {
        Ok(regs) => format!(", vCPU {}, guest RIP {:#x}", cell.id(), regs.rip),
        Err(_) => format!(", vCPU {}", cell.id()),
    }
}

fn leave(py: Python<'_>, raised: &Raised, error: PyErr, text: &str) {
    // Fails when memory is short: then the exception alone has to do.
    let _ = error.value(py).call_method1(intern!(py, "add_note"), (text,));
    raised.raise(py, error);
}

/// Whether a callback has returned a `Stop`, whose value is left for the run.
fn is_stop(value: &Bound<'_, PyAny>, raised: &Raised) -> PyResult<bool> {
    let py = value.py();
    static STOP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if !value.is_instance(STOP.import(py, "pyvmm.exits", "Stop")?)? {
        return Ok(false);
    }
    let vcpu = current().map_or(0, |cell| cell.id());
    raised.stop(vcpu, value.getattr(intern!(py, "value"))?.unbind());
    Ok(true)
}

fn answer_of(device: &PythonDevice, value: &Bound<'_, PyAny>, wanted: usize) -> PyResult<Answer> {
    // The usual answer is a number.
    if !value.is_instance_of::<PyInt>() && is_stop(value, device.raised())? {
        return Ok(Answer::Stop);
    }
    bytes_of(value, wanted).map(Answer::Bytes)
}

fn done(device: &PythonDevice, method: &Py<PyAny>, value: &Bound<'_, PyAny>) -> PyResult<Answer> {
    if value.is_none() {
        return Ok(Answer::Done);
    }
    if is_stop(value, device.raised())? {
        return Ok(Answer::Stop);
    }
    refuse_awaitable(value, || name_of(method.bind(value.py())))?;
    Ok(Answer::Done)
}

/// `device.read(offset, size)`
pub(super) fn read(device: &PythonDevice, method: &Py<PyAny>, offset: u64, size: usize) -> Answer {
    call_device(device, "read", offset, |py| {
        answer_of(device, &method.bind(py).call1((offset, size))?, size)
    })
}

/// `device.write(offset, size, value)`
pub(super) fn write(device: &PythonDevice, method: &Py<PyAny>, offset: u64, data: &[u8]) -> Answer {
    let number = data.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    call_device(device, "write", offset, |py| {
        done(device, method, &method.bind(py).call1((offset, data.len(), number))?)
    })
}

/// `device.read_many(offset, size, count)`
pub(super) fn read_many(
    device: &PythonDevice,
    method: &Py<PyAny>,
    offset: u64,
    size: usize,
    bytes: usize,
) -> Answer {
    call_device(device, "read_many", offset, |py| {
        let value = method.bind(py).call1((offset, size, bytes / size.max(1)))?;
        answer_of(device, &value, bytes)
    })
}

/// `device.write_many(offset, size, data)`
pub(super) fn write_many(
    device: &PythonDevice,
    method: &Py<PyAny>,
    offset: u64,
    size: usize,
    data: &[u8],
) -> Answer {
    call_device(device, "write_many", offset, |py| {
        done(device, method, &method.bind(py).call1((offset, size, PyBytes::new(py, data)))?)
    })
}

/// Ask the hooks of an exit's kind, in the order they were added, until one has something to say.
pub(super) fn on_exit(hooks: &Hooks, exit: &VcpuExit) -> Verdict {
    let (Some(kind), Some(cell)) = (exit.kind(), current()) else { return Verdict::Pass };
    on_vcpu_thread(
        |py| ask(py, hooks, kind, &cell, exit),
        |py, error| {
            let text = format!("in a hook of an exit of kind {}{}", kind.name(), position());
            leave(py, &hooks.raised, error, &text);
            Verdict::Stop
        },
    )
}

fn ask(
    py: Python<'_>,
    hooks: &Hooks,
    kind: ExitKind,
    cell: &Arc<Cell>,
    exit: &VcpuExit,
) -> PyResult<Verdict> {
    let functions = hooks.of(kind);
    let vcpu = hooks.vcpu(py, cell).into_pyobject(py)?;
    let shown = PyVcpuExit::of(py, exit.clone())?.into_pyobject(py)?;
    for function in functions.iter() {
        let function = function.bind(py);
        let said = recorded(|| name_of(function), || function.call1((&vcpu, &shown)))?;
        if !said.is_none() {
            return verdict(hooks, exit, &said);
        }
    }
    Ok(Verdict::Pass)
}

fn verdict(hooks: &Hooks, exit: &VcpuExit, said: &Bound<'_, PyAny>) -> PyResult<Verdict> {
    let py = said.py();
    static ACTION: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if said.is_instance(ACTION.import(py, "pyvmm.exits", "ExitAction")?)? {
        let name: String = said.getattr(intern!(py, "value"))?.extract()?;
        return match name.as_str() {
            "retry" if exit.is_write() => Err(PyValueError::new_err(
                "ExitAction.RETRY: the guest's write has been executed and cannot be taken back",
            )),
            "retry" => Ok(Verdict::Retry),
            _ => Ok(Verdict::Handled(None)),
        };
    }
    if is_stop(said, &hooks.raised)? {
        return Ok(Verdict::Stop);
    }
    match exit.wanted() {
        Some(wanted) => Ok(Verdict::Handled(Some(bytes_of(said, wanted)?))),
        None => {
            let class = said.get_type();
            Err(PyTypeError::new_err(format!(
                "a hook of an exit that reads nothing returns None, an ExitAction or a Stop, not {}",
                class.name()?
            )))
        }
    }
}

/// Tell a function how far a long call has come, and run Python's signal handlers. On the thread of
/// that call.
pub(super) fn progress(function: Option<&Py<PyAny>>, done: u64, total: u64) -> PyResult<()> {
    attach(|py| {
        if let Some(function) = function {
            let function = function.bind(py);
            let said = call_out(py, |_| function.call1((done, total)))?;
            refuse_awaitable(&said, || name_of(function))?;
        }
        py.check_signals()
    })
}

/// `device.save()`. On the thread that takes the snapshot.
pub(super) fn save(method: &Py<PyAny>) -> PyResult<Vec<u8>> {
    attach(|py| {
        let state = call_out(py, |py| method.call0(py))?;
        let bytes: PyBackedBytes = state.extract(py)?;
        Ok(bytes.to_vec())
    })
}

/// `device.restore(state)`. On the thread that forks or resets.
pub(super) fn restore(method: &Py<PyAny>, state: &[u8]) -> PyResult<()> {
    attach(|py| {
        let method = method.bind(py);
        let state = PyBytes::new(py, state);
        let said = call_out(py, |_| method.call1((state,)))?;
        refuse_awaitable(&said, || name_of(method))
    })
}
