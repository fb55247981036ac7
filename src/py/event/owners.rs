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
    /// Inside a run of the loop's own.
    Runner,
    /// Inside the run of one machine of several, which turn the loop at once.
    Sharer,
    /// Runs an asyncio loop that turns this one when it is ready.
    Host,
}

#[derive(Debug)]
struct LoopOwner {
    thread: ThreadId,
    role: Role,
    /// Called with what a callback returns to be awaited, and its name. From any thread.
    awaiter: Option<Py<PyAny>>,
}

/// While it lives, its thread is one that turns the loop.
pub(crate) struct Ownership<'a> {
    owners: &'a LoopOwners,
    role: Role,
    process_tag: ProcessTag,
}

impl Drop for Ownership<'_> {
    fn drop(&mut self) {
        // In a child that a callback has forked, the loop is its parent's.
        if !self.process_tag.is_forked_child() {
            self.owners.leave(self.role);
        }
    }
}

impl LoopOwners {
    /// Be one of them, unless `refuse` has something against one that is there.
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
        // Outside the lock: its awaiter may run Python code as it goes.
        drop(left);
    }

    /// Become the one thread that turns the loop; machines that share it may turn it beside. The
    /// host's thread may, too: that is how it hosts.
    pub(crate) fn claim(&self, what: &str, awaiter: Option<Py<PyAny>>) -> PyResult<Ownership<'_>> {
        let thread = std::thread::current().id();
        self.enter_unless(Role::Runner, awaiter, |other| {
            let refused = match other.role {
                Role::Runner => "is running already: one run at a time",
                Role::Sharer if other.thread == thread => "is running already: one run at a time",
                Role::Host if other.thread != thread => {
                    "is hosted by an asyncio loop in another thread: one run at a time"
                }
                Role::Sharer | Role::Host => return None,
            };
            Some(format!("{what} {refused}"))
        })
    }

    /// Become one of the threads that turn the loop for a machine each.
    pub(crate) fn share(&self, awaiter: Option<Py<PyAny>>) -> PyResult<Ownership<'_>> {
        self.enter_unless(Role::Sharer, awaiter, |_| None)
    }

    /// Have this thread's asyncio loop turn the loop, until [`Self::end_hosting`].
    pub(crate) fn host(&self, awaiter: Py<PyAny>) -> PyResult<()> {
        let hosting = self.enter_unless(Role::Host, Some(awaiter), |other| {
            let detail = "this event manager is running or hosted already: one run at a time";
            (other.role != Role::Sharer).then(|| detail.to_owned())
        })?;
        std::mem::forget(hosting);
        Ok(())
    }

    /// This thread's asyncio loop hosts the loop no longer.
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

    /// Who takes what a callback on this thread returns to be awaited: whoever turns the loop here,
    /// otherwise any of those that turn it elsewhere.
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
