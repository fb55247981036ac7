//! Requests of other threads to the thread that runs a loop: calls to make, and to stop. A request
//! is queued here before the wake-up; each iteration checks the queue after its dispatch has
//! consumed the wake-up. So if an iteration misses a request, its wake-up is still to come.

use std::collections::VecDeque;

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(not(loom))]
use crate::sync::{Mutex, MutexGuard, rank};

#[cfg(not(loom))]
type Queue<T> = Mutex<VecDeque<T>, rank::Calls>;
#[cfg(not(loom))]
type QueueGuard<'a, T> = MutexGuard<'a, VecDeque<T>, rank::Calls>;
#[cfg(loom)]
type Queue<T> = Mutex<VecDeque<T>>;
#[cfg(loom)]
type QueueGuard<'a, T> = MutexGuard<'a, VecDeque<T>>;

/// The queued calls, and the stop request.
#[derive(Debug)]
pub struct Calls<T> {
    queue: Queue<T>,
    has_calls: AtomicBool,
    stopping: AtomicBool,
}

impl<T> Default for Calls<T> {
    fn default() -> Self {
        Self {
            queue: Mutex::new(VecDeque::new()),
            has_calls: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }
    }
}

impl<T> Calls<T> {
    #[cfg(not(loom))]
    fn lock(&self) -> QueueGuard<'_, T> {
        self.queue.lock()
    }

    #[cfg(loom)]
    #[allow(clippy::unwrap_used, reason = "in a test")]
    fn lock(&self) -> QueueGuard<'_, T> {
        self.queue.lock().unwrap()
    }

    /// Queue a call. The caller then kicks the loop.
    pub fn push(&self, call: T) {
        self.lock().push_back(call);
        // Release: pairs with the acquire in `waiting`, so that a thread that sees the flag finds
        // the call.
        self.has_calls.store(true, Ordering::Release);
    }

    /// The number of queued calls.
    pub fn waiting(&self) -> usize {
        if !self.has_calls.load(Ordering::Acquire) {
            return 0;
        }
        // Cleared first: a call queued now sets it again. Release, so that the clearing is not
        // reordered after the check.
        self.has_calls.store(false, Ordering::Release);
        self.lock().len()
    }

    /// Take the next call.
    pub fn pop(&self) -> Option<T> {
        self.lock().pop_front()
    }

    /// Keep the calls that were not made for the next iteration. Returns whether there are any. The
    /// caller then kicks the loop.
    pub fn keep(&self) -> bool {
        let has_calls = !self.lock().is_empty();
        if has_calls {
            self.has_calls.store(true, Ordering::Release);
        }
        has_calls
    }

    /// Request a stop. The caller then kicks the loop.
    pub fn stop(&self) {
        // Release: the loop's thread sees everything done before the request.
        self.stopping.store(true, Ordering::Release);
    }

    /// Take the stop request. Returns whether there was one.
    pub fn take_stop(&self) -> bool {
        // Acquire and release: as in `stop`. Loaded before the swap, which is cheaper and happens
        // in each iteration.
        self.stopping.load(Ordering::Acquire) && self.stopping.swap(false, Ordering::AcqRel)
    }

    /// Take all calls.
    pub fn take_all(&self) -> VecDeque<T> {
        std::mem::take(&mut *self.lock())
    }

    /// Visit each call, under the lock.
    ///
    /// # Errors
    /// The first one of `look`.
    pub fn try_for_each<E>(&self, look: impl FnMut(&T) -> Result<(), E>) -> Result<(), E> {
        #[cfg(not(loom))]
        let queue = self.queue.try_lock();
        #[cfg(loom)]
        let queue = self.queue.try_lock().ok();
        queue.map_or(Ok(()), |queue| queue.iter().try_for_each(look))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn calls_come_in_order_and_those_left_are_looked_at_again() {
        let calls = Calls::default();
        assert_eq!(calls.waiting(), 0);
        [1, 2, 3].into_iter().for_each(|call| calls.push(call));
        assert_eq!((calls.waiting(), calls.waiting()), (3, 0));
        assert_eq!(calls.pop(), Some(1));
        assert!(calls.keep());
        assert_eq!(calls.waiting(), 2);
        assert_eq!(calls.take_all(), [2, 3]);
        assert!(!calls.keep());
    }

    #[test]
    fn a_stop_is_taken_once() {
        let calls = Calls::<()>::default();
        calls.stop();
        assert!(calls.take_stop());
        assert!(!calls.take_stop());
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::{Arc, Condvar};

    /// The eventfd that a kick writes to, and the wait for it.
    #[derive(Default)]
    struct Wake {
        is_kicked: Mutex<bool>,
        kicked: Condvar,
    }

    impl Wake {
        fn kick(&self) {
            *self.is_kicked.lock().unwrap() = true;
            self.kicked.notify_all();
        }

        /// Returns after a kick. If none comes, loom reports a deadlock.
        fn wait(&self) {
            let mut is_kicked = self.is_kicked.lock().unwrap();
            while !*is_kicked {
                is_kicked = self.kicked.wait(is_kicked).unwrap();
            }
            *is_kicked = false;
        }
    }

    type Shared = Arc<(Calls<usize>, Wake)>;

    /// Like `run_forever`: runs until a stop is requested and all calls are made.
    fn run(shared: &Shared, most: usize) {
        let (calls, wake) = &**shared;
        let (mut made, mut is_stopped) = (0, false);
        while !(is_stopped && made == most) {
            is_stopped |= calls.take_stop();
            if is_stopped && made == most {
                break;
            }
            wake.wait();
            for _ in 0..calls.waiting() {
                made += usize::from(calls.pop().is_some());
            }
        }
    }

    #[test]
    fn no_call_and_no_stop_is_lost_at_any_moment() {
        let mut model = loom::model::Builder::new();
        // Without a bound the model takes minutes.
        model.preemption_bound = Some(3);
        model.check(|| {
            let shared = Shared::default();
            let caller = {
                let shared = Arc::clone(&shared);
                loom::thread::spawn(move || {
                    shared.0.push(1);
                    shared.1.kick();
                    shared.0.push(2);
                    shared.1.kick();
                })
            };
            let stopper = {
                let shared = Arc::clone(&shared);
                loom::thread::spawn(move || {
                    shared.0.stop();
                    shared.1.kick();
                })
            };
            run(&shared, 2);
            caller.join().unwrap();
            stopper.join().unwrap();
        });
    }
}
