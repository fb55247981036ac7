//! Runs an iteration of the loop: wait and dispatch, or dispatch first. Runs on the loop's thread.

use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::errors::event_error;
use super::manager::EventManager;
use super::registrations::Registrations;
use super::turn_lock::NextTurn;
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;

impl EventManager {
    /// Wait for events and dispatch them once. Returns the number of dispatched events.
    ///
    /// # Errors
    /// If epoll fails.
    pub fn run(&self) -> Result<usize> {
        loop {
            let dispatched = self.run_with_timeout(-1)?;
            if dispatched > 0 {
                return Ok(dispatched);
            }
        }
    }

    /// Like [`Self::run`], but wait at most this long; -1 means no limit. Returns 0 if the time
    /// passed, a signal interrupted the wait, or [`Self::kick`] was called.
    ///
    /// # Errors
    /// If epoll fails.
    pub fn run_with_timeout(&self, milliseconds: i32) -> Result<usize> {
        let limit = u64::try_from(milliseconds).ok().map(Duration::from_millis);
        let next = self.next_turn().until(limit.map(|limit| Instant::now() + limit));
        Ok(self.run_until(next, None)?.unwrap_or(0))
    }

    /// Like [`Self::run`], but wait at most until the time of `next`. Returns 0 after
    /// [`Self::kick`], or if another thread has dispatched, so that the caller checks its requests.
    /// Returns None if the time passed, a signal interrupted the wait, or `interrupt` is readable.
    ///
    /// # Errors
    /// If epoll fails.
    pub fn run_until(&self, next: NextTurn, interrupt: Option<RawFd>) -> Result<Option<usize>> {
        self.check_process()?;
        let Some(turn) = self.begin_turn() else {
            self.turns.wait(next);
            return Ok(Some(0));
        };
        let deadline = turn.until(next);
        loop {
            let Dispatched { events, woken } = self.dispatch(&mut self.registrations.lock())?;
            if events > 0 || woken {
                return Ok(Some(events));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            if !self.epoll.wait(deadline, interrupt)? {
                return Ok(None);
            }
        }
    }

    /// Like [`Self::run_until`], for a thread that has begun an iteration and expects no ready
    /// events: it waits before it dispatches.
    ///
    /// # Errors
    /// If epoll fails.
    pub fn wait_until(
        &self,
        deadline: Option<Instant>,
        interrupt: Option<RawFd>,
    ) -> Result<Option<usize>> {
        self.check_process()?;
        if !self.epoll.wait(deadline, interrupt)? {
            return Ok(None);
        }
        Ok(Some(self.dispatch(&mut self.registrations.lock())?.events))
    }

    /// Dispatch without waiting, not even for the manager's lock, in an iteration of this thread.
    /// None if another thread holds the lock, or nothing was ready. `take` is called after the
    /// dispatch, with the lock still held.
    ///
    /// # Errors
    /// If epoll fails.
    pub fn try_dispatch(&self, take: impl FnOnce()) -> Result<Option<usize>> {
        self.check_process()?;
        let Some(mut registrations) = self.registrations.try_lock() else {
            return Ok(None);
        };
        let Dispatched { events, woken } = self.dispatch(&mut registrations)?;
        take();
        Ok((events > 0 || woken).then_some(events))
    }

    /// Dispatch the ready events, without waiting.
    pub(super) fn dispatch(&self, registrations: &mut Registrations) -> Result<Dispatched> {
        hop!();
        registrations.drop_stale(&self.epoll)?;
        // Upstream's dispatch has an `unreachable!` for an unknown fd. Stale registrations are
        // dropped when they arise. If one is missed, or a subscriber panics, this stops the
        // unwinding.
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

/// The result of a dispatch.
pub(super) struct Dispatched {
    pub(super) events: usize,
    /// Whether a wake-up was consumed. The caller then has to check its requests.
    pub(super) woken: bool,
}
