//! Which threads turn a loop: one, and beside it one for each machine that shares it.

use std::thread::ThreadId;

use super::ending;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Turners(Mutex<Vec<Turner>, rank::Turners>);

#[derive(Clone, Copy, Debug, PartialEq)]
struct Turner {
    thread: ThreadId,
    /// For one machine of several, which turn the loop at once.
    is_sharer: bool,
}

/// While it lives, its thread is one that turns the loop.
pub(super) struct Turning<'a> {
    turners: &'a Turners,
    turner: Turner,
}

impl Drop for Turning<'_> {
    fn drop(&mut self) {
        let mut turners = self.turners.0.lock();
        if let Some(at) = turners.iter().rposition(|turner| *turner == self.turner) {
            turners.remove(at);
        }
    }
}

impl Turners {
    /// Become the one thread that turns the loop; machines that share it may turn it beside.
    pub(super) fn claim(&self, what: &str) -> Result<Turning<'_>> {
        ending::check()?;
        let turner = Turner { thread: std::thread::current().id(), is_sharer: false };
        let mut turners = self.0.lock();
        if turners.iter().any(|other| !other.is_sharer || other.thread == turner.thread) {
            let detail = format!("{what} is running already: one run at a time");
            return Err(Error::new(ErrorKind::State, "run", detail));
        }
        turners.push(turner);
        Ok(Turning { turners: self, turner })
    }

    /// Become one of the threads that turn the loop for a machine each.
    pub(super) fn share(&self) -> Result<Turning<'_>> {
        ending::check()?;
        let turner = Turner { thread: std::thread::current().id(), is_sharer: true };
        self.0.lock().push(turner);
        Ok(Turning { turners: self, turner })
    }

    pub(super) fn has_this_thread(&self) -> bool {
        let thread = std::thread::current().id();
        self.0.lock().iter().any(|turner| turner.thread == thread)
    }
}
