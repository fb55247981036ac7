//! Exit hooks: Python functions that are called for a machine's exits before these are answered.
//! They run on the thread of the vCPU that exited.

use std::sync::{Arc, Weak};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyType, PyWeakrefReference};

use super::device::bytes_of;
use super::enter::on_vcpu_thread;
use super::gil_cell::GilCell;
use super::lease::Tie;
use super::parts::Parts;
use super::pending_outcome::{PendingOutcome, position};
use super::recorded::{name_of, recorded};
use super::vcpu::PyVcpu;
use super::vcpu_exit::PyVcpuExit;
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};
use crate::vcpu::{ExitHook, ExitKind, Reply, VcpuExit, VcpuHandle, current};

/// The hooks of one kind.
type Functions = Arc<Vec<Py<PyAny>>>;

/// The hooks of one machine. No Python code runs under its locks.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    functions: Mutex<[Functions; ExitKind::ALL.len()], rank::HookFunctions>,
    /// Weak references to the machine's object and its parts, because the machine holds these
    /// hooks.
    machine: GilCell<Option<(Py<PyWeakrefReference>, Weak<Parts>)>>,
    /// The MSRs whose accesses cause exits.
    msrs: Mutex<Vec<u32>, rank::HookMsrs>,
    pub(super) pending: Arc<PendingOutcome>,
    tie: Tie,
}

impl Hooks {
    pub(super) fn over(pending: Arc<PendingOutcome>, tie: &Tie) -> Self {
        Self { pending, tie: tie.clone(), ..Self::default() }
    }

    fn change(&self, kind: ExitKind, change: impl FnOnce(&[Py<PyAny>]) -> Vec<Py<PyAny>>) {
        let mut functions = self.functions.lock();
        let former = functions.get_mut(kind as usize).map(|of_kind| {
            let changed = change(of_kind);
            std::mem::replace(of_kind, Arc::new(changed))
        });
        drop(functions);
        // Outside the lock, because dropping it may run Python code.
        drop(former);
    }

    pub(super) fn add(&self, py: Python<'_>, kind: ExitKind, function: Py<PyAny>) {
        self.change(kind, |known| {
            known.iter().map(|known| known.clone_ref(py)).chain([function]).collect()
        });
    }

    /// Remove a hook. Returns whether it existed.
    pub(super) fn remove(&self, kind: ExitKind, function: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = function.py();
        let known = self.of(kind);
        // Compared outside the lock and with Python's `==`, because each access creates a new bound
        // method.
        let mut at = None;
        for (number, known) in known.iter().enumerate() {
            if known.bind(py).eq(function)? {
                at = Some(number);
                break;
            }
        }
        let Some(at) = at.and_then(|at| known.get(at)) else { return Ok(false) };
        self.change(kind, |now| {
            // Another thread may have removed it meanwhile. A hook that was added twice stays once.
            let gone = now.iter().position(|other| other.is(at));
            let others = now.iter().enumerate().filter(|(number, _)| Some(*number) != gone);
            others.map(|(_, other)| other.clone_ref(py)).collect()
        });
        Ok(true)
    }

    /// Add registers to the filter. Returns all registers, and those that were new.
    pub(super) fn filter(&self, more: Vec<u32>) -> (Vec<u32>, Vec<u32>) {
        let mut msrs = self.msrs.lock();
        let mut added: Vec<u32> = more.into_iter().filter(|msr| !msrs.contains(msr)).collect();
        added.sort_unstable();
        added.dedup();
        msrs.extend(&added);
        (msrs.clone(), added)
    }

    /// Remove registers from the filter, or all of them if no hook of their kind is left. Returns
    /// whether that is so.
    pub(super) fn unfilter(&self, added: &[u32]) -> bool {
        let is_last = self.of(ExitKind::Msr).is_empty();
        self.msrs.lock().retain(|msr| !is_last && !added.contains(msr));
        is_last
    }

    pub(super) fn kinds(&self) -> Vec<ExitKind> {
        let functions = self.functions.lock();
        let pairs = ExitKind::ALL.into_iter().zip(functions.iter());
        pairs.filter(|(_, of_kind)| !of_kind.is_empty()).map(|(kind, _)| kind).collect()
    }

    pub(super) fn of(&self, kind: ExitKind) -> Functions {
        self.functions.lock().get(kind as usize).cloned().unwrap_or_default()
    }

    /// Store the machine of these hooks, for the vCPU objects that are passed to them.
    pub(super) fn belong_to(&self, machine: &Bound<'_, PyAny>, parts: &Arc<Parts>) -> PyResult<()> {
        let new = (PyWeakrefReference::new(machine)?.unbind(), Arc::downgrade(parts));
        let former = self.machine.with(machine.py(), |known| known.replace(new));
        drop(former);
        Ok(())
    }

    /// The object for a vCPU. It keeps the machine alive unless the machine is being dropped.
    pub(super) fn vcpu<'py>(
        &self,
        py: Python<'py>,
        handle: &Arc<VcpuHandle>,
    ) -> PyResult<Bound<'py, PyVcpu>> {
        let machine = self.machine.with(py, |machine| {
            machine.as_ref().map(|(object, parts)| (object.clone_ref(py), Weak::clone(parts)))
        });
        let machine = machine
            .and_then(|(object, parts)| Some((object.bind(py).upgrade()?, parts.upgrade()?)));
        match machine {
            Some((object, parts)) => PyVcpu::of_machine(&object, handle, &parts),
            None => Bound::new(py, PyVcpu::of(handle, None, &self.tie)),
        }
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Some(functions) = self.functions.try_lock() {
            // An Arc that a call also holds is not visited. Then the machine is running and is not
            // garbage.
            functions.iter().flat_map(|of_kind| of_kind.iter()).try_for_each(|f| visit.call(f))?;
        }
        Ok(())
    }
}

impl ExitHook for Hooks {
    fn on_exit(&self, _vcpu: u64, exit: &VcpuExit, reply: &mut Reply) -> Option<Outcome> {
        on_exit(self, exit, reply)
    }
}

/// Call the hooks of an exit's kind, in the order they were added, until one answers.
fn on_exit(hooks: &Hooks, exit: &VcpuExit, reply: &mut Reply) -> Option<Outcome> {
    let (kind, handle) = (exit.kind()?, current()?);
    on_vcpu_thread(
        |py| {
            let said = ask(py, hooks, kind, &handle, exit)?;
            said.map(|said| outcome_of(hooks, exit, &said, reply)).transpose()
        },
        |py, error| {
            let text = format!("in a hook of an exit of kind {}{}", kind.name(), position());
            hooks.pending.raise_with_note(py, error, &text);
            Some(Outcome::Stop)
        },
    )
}

/// The answer of the first hook that answers.
fn ask<'py>(
    py: Python<'py>,
    hooks: &Hooks,
    kind: ExitKind,
    handle: &Arc<VcpuHandle>,
    exit: &VcpuExit,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let functions = hooks.of(kind);
    let vcpu = hooks.vcpu(py, handle)?;
    let shown = PyVcpuExit::of(py, exit.clone())?.into_pyobject(py)?;
    for function in functions.iter() {
        let function = function.bind(py);
        let said = recorded(|| name_of(function), || function.call1((&vcpu, &shown)))?;
        if !said.is_none() {
            return Ok(Some(said));
        }
    }
    Ok(None)
}

/// The outcome for a hook's answer. Fills `reply` with the value that the guest reads.
fn outcome_of(
    hooks: &Hooks,
    exit: &VcpuExit,
    said: &Bound<'_, PyAny>,
    reply: &mut Reply,
) -> PyResult<Outcome> {
    let py = said.py();
    static ACTION: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    if said.is_instance(ACTION.import(py, "pyvmm.exits", "ExitAction")?)? {
        let name: String = said.getattr(intern!(py, "value"))?.extract()?;
        if name == "retry" && exit.is_write() {
            return Err(PyValueError::new_err(
                "ExitAction.RETRY: the guest's write has already been executed",
            ));
        }
        if name == "retry" {
            *reply = Reply::Retry;
        }
        return Ok(Outcome::Continue);
    }
    if hooks.pending.take_if_stop(said)? {
        return Ok(Outcome::Stop);
    }
    match exit.wanted() {
        Some(wanted) => {
            *reply = Reply::Data(bytes_of(said, wanted)?);
            Ok(Outcome::Continue)
        }
        None => {
            let class = said.get_type();
            Err(PyTypeError::new_err(format!(
                "a hook of an exit that reads nothing returns None, an ExitAction or a Stop, not {}",
                class.name()?
            )))
        }
    }
}
