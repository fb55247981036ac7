//! How a loop is turned: wait, dispatch, or the other way around. On the thread that turns it.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use super::manager::{Dispatched, EventManager};
use crate::error::Result;

impl EventManager {
    /// Wait for events and dispatch them once; returns how many were dispatched.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn run(&self) -> Result<usize> {
        loop {
            let dispatched = self.run_with_timeout(-1)?;
            if dispatched > 0 {
                return Ok(dispatched);
            }
        }
    }

    /// [`Self::run`] for at most this long; -1 for no limit. Returns 0 when the time passed, a
    /// signal interrupted the wait, or [`Self::kick`] was called.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn run_with_timeout(&self, milliseconds: i32) -> Result<usize> {
        let limit = u64::try_from(milliseconds).ok().map(Duration::from_millis);
        let dispatched = self.run_until(limit.map(|limit| Instant::now() + limit), None)?;
        Ok(dispatched.unwrap_or(0))
    }

    /// [`Self::run`] until this time, none for no limit. After [`Self::kick`] it returns 0: who was
    /// kicked has something to look at. None when the time passed, a signal interrupted the wait,
    /// `interrupt` turned readable, or, in a shared loop, every 50 ms.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn run_until(
        &self,
        deadline: Option<Instant>,
        interrupt: Option<RawFd>,
    ) -> Result<Option<usize>> {
        self.check_process()?;
        loop {
            let Dispatched { events, woken } = self.dispatch(&mut self.inner.lock())?;
            if events > 0 || woken {
                return Ok(Some(events));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            if !self.waits.wait(deadline, |until| self.epoll.wait(until, interrupt))? {
                return Ok(None);
            }
        }
    }

    /// [`Self::run_until`] for a thread that expects nothing to be ready yet: it waits before it
    /// looks.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn wait_until(
        &self,
        deadline: Option<Instant>,
        interrupt: Option<RawFd>,
    ) -> Result<Option<usize>> {
        self.check_process()?;
        if !self.waits.wait(deadline, |until| self.epoll.wait(until, interrupt))? {
            return Ok(None);
        }
        Ok(Some(self.dispatch(&mut self.inner.lock())?.events))
    }
}
