//! Limits on waits for callbacks: a deadline, and interruption by a signal. Any thread.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// The interval at which a wait checks whether it is interrupted.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The end of a timeout that begins now; `None` without a timeout, or beyond the clock's range.
pub(crate) fn deadline_of(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// Called periodically during a wait, with no lock held. An error ends the wait.
pub type Interrupted<'a> = &'a (dyn Fn() -> Result<()> + 'a);

/// Ends a wait for vCPUs that may be in callbacks.
#[derive(Clone, Copy)]
pub struct Limit<'a> {
    deadline: Option<Instant>,
    interrupted: Interrupted<'a>,
}

impl fmt::Debug for Limit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl<'a> Limit<'a> {
    /// No limit.
    pub const NONE: Limit<'static> = Limit { deadline: None, interrupted: &|| Ok(()) };

    /// A limit that ends after `timeout`, if given. `interrupted` is called every 50 ms during the
    /// wait, with no lock held. An error ends the wait.
    pub fn new(timeout: Option<Duration>, interrupted: Interrupted<'a>) -> Self {
        Self { deadline: deadline_of(timeout), interrupted }
    }

    /// Call `wait` repeatedly until it returns true. It gets the time until which it may wait.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at `at` after the timeout; the error of `interrupted`.
    pub(crate) fn wait(
        &self,
        at: impl fmt::Display,
        mut wait: impl FnMut(Instant) -> bool,
    ) -> Result<()> {
        loop {
            let slice = Instant::now() + CHECK_INTERVAL;
            if wait(self.deadline.map_or(slice, |deadline| deadline.min(slice))) {
                return Ok(());
            }
            (self.interrupted)()?;
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let detail = "a callback of the machine did not return within the time limit";
                return Err(Error::new(ErrorKind::Timeout, at.to_string(), detail));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_wait_that_is_over_is_not_interrupted() {
        let limit = Limit::new(Some(Duration::ZERO), &|| panic!("nothing is waited for"));
        limit.wait("here", |_| true).unwrap();
    }

    #[test]
    fn the_time_limit_ends_a_wait() {
        let limit = Limit::new(Some(Duration::ZERO), &|| Ok(()));
        let error = limit.wait("here", |until| Instant::now() < until).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Timeout, "here"));
    }

    #[test]
    fn an_interruption_ends_a_wait() {
        let asked = Cell::new(0);
        let interrupted = || {
            asked.set(asked.get() + 1);
            if asked.get() < 3 { Ok(()) } else { Err(Error::new(ErrorKind::State, "signal", "")) }
        };
        let error = Limit::new(None, &interrupted).wait("here", |_| false).unwrap_err();
        assert_eq!((error.kind, asked.get()), (ErrorKind::State, 3));
    }
}
