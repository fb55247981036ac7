//! The threads that run a loop: one, or one for each machine that shares it, or the thread of the
//! asyncio loop that hosts it; and the functions that await the coroutines of its callbacks.

use std::thread::ThreadId;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use crate::error::{Error, ErrorKind};
use crate::process::ProcessTag;
use crate::py::ending;
use crate::sync::{Mutex, rank};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LoopOwners(Mutex<Vec<LoopOwner>, rank::LoopOwners>);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    /// Runs the loop itself.
    Runner,
    /// Runs the loop for one of several machines that share it.
    Sharer,
    /// Runs an asyncio loop that hosts this one.
    Host,
}

#[derive(Debug)]
struct LoopOwner {
    thread: ThreadId,
    role: Role,
    /// Called with an awaitable returned by a callback, and its name, from any thread.
    awaiter: Option<Py<PyAny>>,
}

/// Registers its thread as one that runs the loop, until it is dropped.
pub(crate) struct Ownership<'a> {
    owners: &'a LoopOwners,
    role: Role,
    process_tag: ProcessTag,
}

impl Drop for Ownership<'_> {
    fn drop(&mut self) {
        // If a callback has forked, the child's loop belongs to the parent.
        if !self.process_tag.is_forked_child() {
            self.owners.leave(self.role);
        }
    }
}

impl LoopOwners {
    /// Register a thread, unless `refuse` returns a reason against a registered one.
    fn enter_unless(
        &self,
        role: Role,
        awaiter: Option<Py<PyAny>>,
        refuse: impl FnMut(&LoopOwner) -> Option<String>,
    ) -> PyResult<Ownership<'_>> {
        ending::check()?;
        let thread = std::thread::current().id();
        let mut owners = self.0.lock();
        let refused = owners.iter().find_map(refuse);
        if let Some(detail) = refused {
            drop(owners);
            return Err(Error::new(ErrorKind::State, "run", detail).into());
        }
        owners.push(LoopOwner { thread, role, awaiter });
        Ok(Ownership { owners: self, role, process_tag: ProcessTag::current() })
    }

    fn leave(&self, role: Role) {
        let thread = std::thread::current().id();
        let mut owners = self.0.lock();
        let at = owners.iter().rposition(|owner| owner.thread == thread && owner.role == role);
        let left = at.map(|at| owners.remove(at));
        drop(owners);
        // Outside the lock, because dropping its awaiter may run Python code.
        drop(left);
    }

    /// Become the thread that runs the loop. Machines that share the loop may run it at the same
    /// time, and so may the thread that hosts it.
    pub(crate) fn claim(&self, what: &str, awaiter: Option<Py<PyAny>>) -> PyResult<Ownership<'_>> {
        let thread = std::thread::current().id();
        self.enter_unless(Role::Runner, awaiter, |other| {
            let refused = match other.role {
                Role::Runner => "is already running",
                Role::Sharer if other.thread == thread => "is already running",
                Role::Host if other.thread != thread => {
                    "is hosted by an asyncio loop in another thread: one run at a time"
                }
                Role::Sharer | Role::Host => return None,
            };
            Some(format!("{what} {refused}"))
        })
    }

    /// Become one of the threads that run the loop, each for a machine.
    pub(crate) fn share(&self, awaiter: Option<Py<PyAny>>) -> PyResult<Ownership<'_>> {
        self.enter_unless(Role::Sharer, awaiter, |_| None)
    }

    /// Let this thread's asyncio loop host the loop, until [`Self::end_hosting`].
    pub(crate) fn host(&self, awaiter: Py<PyAny>) -> PyResult<()> {
        let hosting = self.enter_unless(Role::Host, Some(awaiter), |other| {
            let detail = "this event manager already runs or has a host";
            (other.role != Role::Sharer).then(|| detail.to_owned())
        })?;
        std::mem::forget(hosting);
        Ok(())
    }

    /// End the hosting by this thread's asyncio loop.
    pub(crate) fn end_hosting(&self) {
        let mut owners = self.0.lock();
        let at = owners.iter().position(|owner| owner.role == Role::Host);
        let left = at.map(|at| owners.remove(at));
        drop(owners);
        drop(left);
    }

    pub(crate) fn has_this_thread(&self) -> bool {
        let thread = std::thread::current().id();
        self.0.lock().iter().any(|owner| owner.thread == thread)
    }

    /// What awaits the results of callbacks on this thread: the awaiter of this thread's run, or
    /// otherwise of any other run.
    pub(crate) fn awaiter(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let thread = std::thread::current().id();
        let owners = self.0.lock();
        let awaiters = || owners.iter().rev().filter(|owner| owner.awaiter.is_some());
        let chosen = awaiters().find(|owner| owner.thread == thread).or_else(|| awaiters().next());
        chosen?.awaiter.as_ref().map(|awaiter| awaiter.clone_ref(py))
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(owners) = self.0.try_lock() else { return Ok(()) };
        owners.iter().try_for_each(|owner| visit.call(&owner.awaiter))
    }

    /// All awaiters, to be dropped where Python code may run.
    pub(crate) fn take_awaiters(&self) -> Vec<Py<PyAny>> {
        self.0.lock().iter_mut().filter_map(|owner| owner.awaiter.take()).collect()
    }
}
