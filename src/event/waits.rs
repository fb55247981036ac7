//! Limits the waits of threads that run a loop. In a shared loop a wait has a maximum length,
//! because another thread may take the event that it waits for.

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::sync::{Condvar, Mutex, rank};

/// The longest wait in a shared loop.
const MAX_SHARED_WAIT: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
pub(super) struct Waits {
    state: Mutex<State, rank::LoopWaits>,
    /// Signalled when the last long wait has ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_shared: bool,
    /// The number of threads in a wait that began before the loop was shared.
    long: usize,
}

impl Waits {
    /// Wait until this time at most, by calling `wait`.
    pub(super) fn wait<T>(
        &self,
        deadline: Option<Instant>,
        wait: impl FnOnce(Option<Instant>) -> T,
    ) -> T {
        let slice = self.begin();
        let until = [deadline, slice].into_iter().flatten().min();
        let result = wait(until);
        self.end(slice);
        result
    }

    /// Begin a wait. Returns when it has to end, in a shared loop.
    fn begin(&self) -> Option<Instant> {
        let mut state = self.state.lock();
        if state.is_shared {
            return Some(Instant::now() + MAX_SHARED_WAIT);
        }
        state.long += 1;
        None
    }

    /// End the wait for which `begin` returned this.
    fn end(&self, slice: Option<Instant>) {
        if slice.is_none() {
            self.state.lock().long -= 1;
            self.ended.notify_all();
        }
    }

    /// Limit every wait from now on. `kick` ends a longer wait in progress.
    pub(super) fn share(&self, kick: impl Fn() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        state.is_shared = true;
        while state.long > 0 {
            kick()?;
            // With a timeout, because a waiter that was woken for another reason may have taken the
            // kick.
            self.ended.wait_for(&mut state, Duration::from_millis(1));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn waits_are_short_once_the_loop_is_shared() {
        let waits = Waits::default();
        let long = waits.begin();
        assert_eq!(long, None);
        waits.end(long);
        waits.share(|| Ok(())).unwrap();
        assert!(waits.begin().unwrap() <= Instant::now() + MAX_SHARED_WAIT);
    }

    #[test]
    fn sharing_returns_when_the_long_wait_is_over() {
        let (waits, kicked) = (Arc::new(Waits::default()), Arc::new(AtomicBool::new(false)));
        let long = waits.begin();
        let waiter = {
            let (waits, kicked) = (Arc::clone(&waits), Arc::clone(&kicked));
            std::thread::spawn(move || {
                while !kicked.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                waits.end(long);
            })
        };
        waits
            .share(|| {
                kicked.store(true, Ordering::SeqCst);
                Ok(())
            })
            .unwrap();
        waiter.join().unwrap();
        assert_eq!(waits.state.lock().long, 0);
    }
}
