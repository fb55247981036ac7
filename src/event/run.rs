//! How a loop is turned: wait, dispatch, or the other way around. On the thread that turns it.

use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::errors::event_error;
use super::manager::EventManager;
use super::registrations::Registrations;
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;

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
            let Dispatched { events, woken } = self.dispatch(&mut self.registrations.lock())?;
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
        Ok(Some(self.dispatch(&mut self.registrations.lock())?.events))
    }

    /// [`Self::run_with_timeout`] without waiting, not even for the manager's lock: none when
    /// another thread holds it, or when nothing was ready. `take` is called after the dispatch,
    /// under the lock still.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn try_dispatch(&self, take: impl FnOnce()) -> Result<Option<usize>> {
        self.check_process()?;
        let Some(mut registrations) = self.registrations.try_lock() else {
            return Ok(None);
        };
        let Dispatched { events, woken } = self.dispatch(&mut registrations)?;
        take();
        Ok((events > 0 || woken).then_some(events))
    }

    /// Dispatch what is ready now, without waiting.
    pub(super) fn dispatch(&self, registrations: &mut Registrations) -> Result<Dispatched> {
        hop!();
        registrations.drop_stale(&self.epoll)?;
        // Upstream's dispatch has an `unreachable!` for an fd it does not know. Stale registrations
        // are dropped when they arise; this keeps one that got through, or a panic in a subscriber,
        // from unwinding a run.
        match catch_unwind(AssertUnwindSafe(|| registrations.upstream.run_with_timeout(0))) {
            Ok(result) => {
                let woken = self.epoll.take_woken();
                let events = result.map_err(event_error)?.saturating_sub(usize::from(woken));
                Ok(Dispatched { events, woken })
            }
            Err(_) => {
                let detail = "a subscriber panicked, or an event came for an unknown fd";
                Err(Error::new(ErrorKind::Event, "EventManager.run", detail))
            }
        }
    }
}

/// What a dispatch came to.
pub(super) struct Dispatched {
    pub(super) events: usize,
    /// A wake-up was consumed: the caller has to check its requests.
    pub(super) woken: bool,
}
