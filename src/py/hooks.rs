//! Exit hooks: Python functions that are called for a machine's exits before these are answered,
//! and afterwards (`answers.rs`). They run on the thread of the vCPU that exited.

use std::sync::{Arc, Weak};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyInt, PyTuple, PyType, PyWeakrefReference};

use super::answers;
use super::device::bytes_of;
use super::enter::on_vcpu_thread;
use super::gil_cell::GilCell;
use super::lease::ReuseTracker;
use super::parts::Parts;
use super::pending_outcome::{PendingOutcome, position};
use super::recorded::{name_of, recorded};
use super::vcpu::PyVcpu;
use super::vcpu_exit::PyVcpuExit;
use crate::error::Error;
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};
use crate::vcpu::{Answer, ExitHook, ExitKind, Reply, VcpuExit, VcpuHandle, current};

/// The objects of this many vCPUs are kept at most.
const MAX_KEPT: usize = 1024;

/// When a hook is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Before an exit is answered.
    Exit,
    /// After it has been answered.
    Answer,
}

/// The hooks of one kind. A tuple, so that a call in progress keeps those that it began with.
type Functions = Option<Py<PyTuple>>;

/// The hooks of one machine. No Python code runs under its locks.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    functions: GilCell<[[Functions; ExitKind::ALL.len()]; 2]>,
    /// Weak references to the machine's object and its parts, because the machine holds these
    /// hooks.
    machine: GilCell<Option<(Py<PyWeakrefReference>, Weak<Parts>)>>,
    /// The MSRs whose accesses cause exits.
    msrs: Mutex<Vec<u32>, rank::HookMsrs>,
    pub(super) pending: Arc<PendingOutcome>,
    tracker: ReuseTracker,
    /// The objects that calls of hooks have used, for the next ones.
    kept: GilCell<Kept>,
}

/// Objects that are kept while a thread runs the machine, which therefore is not dropped: each
/// vCPU's object holds the machine.
#[derive(Debug, Default)]
struct Kept {
    /// How many threads run the machine or wait for it.
    runs: usize,
    /// By number.
    vcpus: Vec<Option<KeptVcpu>>,
}

impl Kept {
    /// Keep the objects of a vCPU. Returns what they replace, which is dropped outside the cell.
    fn keep(&mut self, at: usize, new: KeptVcpu) -> Option<KeptVcpu> {
        if self.runs == 0 || at >= MAX_KEPT {
            return Some(new);
        }
        if self.vcpus.len() <= at {
            self.vcpus.resize_with(at + 1, || None);
        }
        self.vcpus.get_mut(at)?.replace(new)
    }
}

#[derive(Debug)]
struct KeptVcpu {
    object: Py<PyVcpu>,
    /// Its last exit. The next one is often the same, and the object cannot change.
    exit: Option<(VcpuExit, Py<PyAny>)>,
}

/// A thread runs the machine.
pub(super) struct KeptVcpusGuard<'a, 'py>(&'a Hooks, Python<'py>);

impl Drop for KeptVcpusGuard<'_, '_> {
    fn drop(&mut self) {
        let former = self.0.kept.with(self.1, |kept| {
            kept.runs -= 1;
            if kept.runs == 0 { std::mem::take(&mut kept.vcpus) } else { Vec::new() }
        });
        drop(former);
    }
}

impl Hooks {
    pub(super) fn new(pending: Arc<PendingOutcome>, tracker: &ReuseTracker) -> Self {
        Self { pending, tracker: tracker.clone(), ..Self::default() }
    }

    fn change(
        &self,
        py: Python<'_>,
        key: (When, ExitKind),
        change: impl Fn(&[Bound<'_, PyAny>]) -> Vec<Py<PyAny>>,
    ) -> PyResult<()> {
        loop {
            let known = self.of(py, key);
            let list: Vec<_> = known.iter().flat_map(|known| known.bind(py).iter()).collect();
            let changed = PyTuple::new(py, change(&list))?.unbind();
            // The tuple's allocation may have run Python code, which may have changed the hooks.
            let is_same = |now: &Functions| match (now, &known) {
                (Some(now), Some(known)) => now.is(known),
                (now, known) => now.is_none() && known.is_none(),
            };
            let former = self.functions.with(py, |functions| {
                let now = functions.get_mut(key.0 as usize)?.get_mut(key.1 as usize)?;
                let now = Some(now).filter(|now| is_same(now))?;
                Some(now.replace(changed))
            });
            // Outside the cell, because dropping it may run Python code.
            if former.is_some() {
                return Ok(());
            }
        }
    }

    pub(super) fn add(
        &self,
        py: Python<'_>,
        key: (When, ExitKind),
        function: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.change(py, key, |known| {
            known.iter().chain([function]).map(|function| function.clone().unbind()).collect()
        })
    }

    /// Remove a hook. Returns whether it existed.
    pub(super) fn remove(
        &self,
        key: (When, ExitKind),
        function: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let py = function.py();
        // Compared with Python's `==`, because each access creates a new bound method.
        let mut found = None;
        for known in self.of(py, key).iter().flat_map(|known| known.bind(py).iter()) {
            if known.eq(function)? {
                found = Some(known);
                break;
            }
        }
        let Some(found) = found else { return Ok(false) };
        self.change(py, key, |now| {
            // Another thread may have removed it meanwhile. A hook that was added twice stays once.
            let gone = now.iter().position(|other| other.is(&found));
            let others = now.iter().enumerate().filter(|(number, _)| Some(*number) != gone);
            others.map(|(_, other)| other.clone().unbind()).collect()
        })?;
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
    pub(super) fn unfilter(&self, py: Python<'_>, added: &[u32]) -> bool {
        let is_last = !self.kinds(py, When::Exit).contains(&ExitKind::Msr);
        self.msrs.lock().retain(|msr| !is_last && !added.contains(msr));
        is_last
    }

    pub(super) fn kinds(&self, py: Python<'_>, when: When) -> Vec<ExitKind> {
        let has_any = |kind: &ExitKind| {
            self.of(py, (when, *kind)).is_some_and(|functions| !functions.bind(py).is_empty())
        };
        ExitKind::ALL.into_iter().filter(has_any).collect()
    }

    #[inline(always)]
    fn of(&self, py: Python<'_>, (when, kind): (When, ExitKind)) -> Functions {
        self.functions.with(py, |functions| {
            functions
                .get(when as usize)?
                .get(kind as usize)?
                .as_ref()
                .map(|functions| functions.clone_ref(py))
        })
    }

    /// A thread begins to run the machine, or to wait for it.
    pub(super) fn keep_vcpus<'py>(&self, py: Python<'py>) -> KeptVcpusGuard<'_, 'py> {
        self.kept.with(py, |kept| kept.runs += 1);
        KeptVcpusGuard(self, py)
    }

    /// Store the machine of these hooks, for the vCPU objects that are passed to them.
    pub(super) fn belong_to(&self, machine: &Bound<'_, PyAny>, parts: &Arc<Parts>) -> PyResult<()> {
        let new = (PyWeakrefReference::new(machine)?.unbind(), Arc::downgrade(parts));
        let py = machine.py();
        let former = self.machine.with(py, |known| known.replace(new));
        let kept = self.kept.with(py, |kept| std::mem::take(&mut kept.vcpus));
        drop((former, kept));
        Ok(())
    }

    /// The objects for the vCPU of this thread and for its exit.
    #[inline(always)]
    fn objects<'py>(
        &self,
        py: Python<'py>,
        vcpu: u64,
        exit: &VcpuExit,
    ) -> PyResult<(Bound<'py, PyVcpu>, Bound<'py, PyAny>)> {
        let at = usize::try_from(vcpu).unwrap_or(usize::MAX);
        let (known, shown) = self.kept.with(py, |kept| match kept.vcpus.get(at) {
            Some(Some(KeptVcpu { object, exit: known })) => {
                let known = known.as_ref().filter(|(known, _)| known == exit);
                (Some(object.clone_ref(py)), known.map(|(_, shown)| shown.clone_ref(py)))
            }
            _ => (None, None),
        });
        if let (Some(object), Some(shown)) = (&known, &shown) {
            return Ok((object.bind(py).clone(), shown.bind(py).clone()));
        }
        let object = match known {
            Some(object) => object.into_bound(py),
            None => {
                let handle = current().ok_or_else(|| Error::closed("machine"))?;
                self.vcpu(py, &handle)?
            }
        };
        let shown = PyVcpuExit::of(py, exit.clone())?.into_pyobject(py)?.into_any();
        // Other exits have parts that the program may change.
        let exit = exit.is_access().then(|| (exit.clone(), shown.clone().unbind()));
        let new = KeptVcpu { object: object.clone().unbind(), exit };
        drop(self.kept.with(py, |kept| kept.keep(at, new)));
        Ok((object, shown))
    }

    /// The object for a vCPU. It keeps the machine alive unless the machine is being dropped.
    fn vcpu<'py>(&self, py: Python<'py>, handle: &Arc<VcpuHandle>) -> PyResult<Bound<'py, PyVcpu>> {
        let machine = self.machine.with(py, |machine| {
            machine.as_ref().map(|(object, parts)| (object.clone_ref(py), Weak::clone(parts)))
        });
        let machine = machine
            .and_then(|(object, parts)| Some((object.bind(py).upgrade()?, parts.upgrade()?)));
        match machine {
            Some((object, parts)) => PyVcpu::of_machine(&object, handle, &parts),
            None => Bound::new(py, PyVcpu::of(handle, None, &self.tracker)),
        }
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // SAFETY: the collector holds the GIL.
        let visited = unsafe {
            self.functions
                .peek(|functions| functions.iter().flatten().try_for_each(|of| visit.call(of)))
        };
        visited.unwrap_or(Ok(()))
    }
}

impl ExitHook for Hooks {
    fn on_exit(&self, vcpu: u64, exit: &VcpuExit, reply: &mut Reply) -> Option<Outcome> {
        on_exit(self, vcpu, exit, reply)
    }

    fn on_answer(&self, vcpu: u64, exit: &VcpuExit, answer: &Answer<'_>) -> bool {
        on_answer(self, vcpu, exit, answer)
    }
}

/// Call the hooks for answers of an exit's kind. Returns whether the run stops.
#[inline(never)]
fn on_answer(hooks: &Hooks, vcpu: u64, exit: &VcpuExit, answer: &Answer<'_>) -> bool {
    let Some(kind) = exit.kind() else { return false };
    on_vcpu_thread(
        |py| {
            let Some(functions) = hooks.of(py, (When::Answer, kind)) else { return Ok(false) };
            let (vcpu, shown) = hooks.objects(py, vcpu, exit)?;
            answers::call_all(functions.bind(py), &vcpu, &shown, answer, &hooks.pending)
        },
        |py, error| {
            let text = format!("in a hook of an answer of kind {}{}", kind.name(), position());
            hooks.pending.raise_with_note(py, error, &text);
            true
        },
    )
}

/// Call the hooks of an exit's kind, in the order they were added, until one answers.
fn on_exit(hooks: &Hooks, vcpu: u64, exit: &VcpuExit, reply: &mut Reply) -> Option<Outcome> {
    let kind = exit.kind()?;
    on_vcpu_thread(
        |py| {
            let said = ask(py, hooks, kind, vcpu, exit)?;
            let Some(said) = said else { return Ok(None) };
            // Usually the answer is a number.
            if let Some(wanted) = exit.wanted().filter(|_| said.is_exact_instance_of::<PyInt>()) {
                *reply = Reply::Data(bytes_of(&said, wanted)?);
                return Ok(Some(Outcome::Continue));
            }
            outcome_of(hooks, exit, &said, reply).map(Some)
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
    vcpu: u64,
    exit: &VcpuExit,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Some(functions) = hooks.of(py, (When::Exit, kind)) else { return Ok(None) };
    let (vcpu, shown) = hooks.objects(py, vcpu, exit)?;
    for function in functions.bind(py).iter_borrowed() {
        let said = recorded(|| name_of(&function), || function.call1((&vcpu, &shown)))?;
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
