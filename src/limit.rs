//! How long a wait for the program's own code may last, and what ends it before: a time limit, or
//! a signal. Any thread.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// How long a wait lasts before it asks again whether it is interrupted.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The end of a time limit that begins now; none for no limit, or one beyond the clock's range.
pub(crate) fn deadline_of(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// Asked now and then during a wait, with no lock held: its error ends the wait.
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
    /// As long as it takes.
    pub const NONE: Limit<'static> = Limit { deadline: None, interrupted: &|| Ok(()) };

    /// Until this time from now; none for no limit. `interrupted` is called with no lock held each
    /// 50 ms while the wait lasts: its error ends the wait.
    pub fn new(timeout: Option<Duration>, interrupted: Interrupted<'a>) -> Self {
        Self { deadline: deadline_of(timeout), interrupted }
    }

    /// Wait with `wait`, which returns whether it is over at the time it is given, at the latest.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`], with this place, when the time has passed; what `interrupted`
    /// returns.
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
    fn a_wait_that_is_over_asks_nobody() {
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
