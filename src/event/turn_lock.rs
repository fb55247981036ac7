//! One thread at a time performs the iterations of a loop that several threads run: it waits,
//! dispatches and delivers, so that an event is delivered once. The others wait until that
//! iteration ends, because it may have dispatched what they wait for.
//!
//! No wait has to be cut into slices. Each thread reads the number of ended iterations before it
//! checks its own requests ([`NextTurn`]). If an iteration has ended since, it does not wait: its
//! request may have been dispatched between the check and the wait. Otherwise the request is still
//! to come, and the thread that performs an iteration receives it and ends this iteration. That
//! thread may be in a callback which waits for another thread's run: who stops that run counts as
//! if an iteration had ended ([`TurnLock::wake`]). The models below run this in every order of
//! their steps.

use std::time::Instant;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use crate::process::ProcessTag;
#[cfg(not(loom))]
use crate::sync::{Condvar, Mutex, MutexGuard, rank};

#[cfg(not(loom))]
type Lock = Mutex<(), rank::TurnLock>;
#[cfg(not(loom))]
type Guard<'a> = MutexGuard<'a, (), rank::TurnLock>;
#[cfg(loom)]
type Lock = Mutex<()>;
#[cfg(loom)]
type Guard<'a> = MutexGuard<'a, ()>;

/// An iteration that a thread is about to perform or to wait for.
#[derive(Clone, Copy, Debug)]
pub struct NextTurn {
    /// The iterations that had ended, and the wake-ups, before the thread checked its requests.
    ended: u64,
    /// Until when it waits; `None` for no limit.
    pub(crate) until: Option<Instant>,
}

impl NextTurn {
    /// The same, with a limit.
    #[must_use]
    pub fn until(self, until: Option<Instant>) -> Self {
        Self { until, ..self }
    }
}

/// Held by the thread that performs an iteration.
#[derive(Debug, Default)]
pub(crate) struct TurnLock {
    /// The holder's number, or 0.
    leader: AtomicU64,
    /// The number of iterations that have ended, and of wake-ups.
    ended: AtomicU64,
    waiting: AtomicUsize,
    lock: Lock,
    changed: Condvar,
}

/// An iteration in progress.
pub(crate) struct TurnGuard<'a> {
    turn_lock: &'a TurnLock,
    /// Whether a callback of this thread took the lock again; the outer guard keeps it.
    is_inner: bool,
    process_tag: ProcessTag,
}

#[cfg(not(loom))]
/// A number that identifies this thread: the address of one of its thread-local variables.
fn this_thread() -> u64 {
    thread_local! {
        static MARK: u8 = const { 0 };
    }
    MARK.with(|mark| std::ptr::from_ref(mark) as u64)
}

#[cfg(loom)]
fn this_thread() -> u64 {
    loom::thread_local! {
        static MARK: Box<u8> = Box::new(0);
    }
    MARK.with(|mark| std::ptr::from_ref(&**mark) as u64)
}

impl TurnLock {
    /// Called before a thread checks its requests.
    pub(crate) fn next(&self) -> NextTurn {
        // Acquire: the check sees what that iteration has dispatched.
        NextTurn { ended: self.ended.load(Ordering::Acquire), until: None }
    }

    /// Whether a thread performs an iteration.
    pub(crate) fn is_led(&self) -> bool {
        // Acquire: pairs with the release at the end of an iteration, whose effects the caller sees
        // if this is false.
        self.leader.load(Ordering::Acquire) != 0
    }

    /// Begin an iteration, unless another thread performs one.
    pub(crate) fn begin(&self) -> Option<TurnGuard<'_>> {
        let (this, process_tag) = (this_thread(), ProcessTag::current());
        // Acquire, to see everything the last leader did. Relaxed: another thread's number says
        // nothing more.
        match self.leader.compare_exchange(0, this, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Some(TurnGuard { turn_lock: self, is_inner: false, process_tag }),
            Err(leader) if leader == this => {
                Some(TurnGuard { turn_lock: self, is_inner: true, process_tag })
            }
            Err(_) => None,
        }
    }

    /// Wait until an iteration has ended, at most until this time. Called without the GIL, which
    /// the iteration may need.
    pub(crate) fn wait(&self, next: NextTurn) {
        let lock = self.locked();
        // Relaxed, with a fence here and at the end of an iteration: either the leader sees a
        // waiting thread, or this thread sees that it is gone. The count alone does not say so: an
        // iteration is counted before its leader is gone, so `next` may include the one for which
        // `begin` has failed.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let is_led = self.leader.load(Ordering::Relaxed) != 0;
        if is_led && self.ended.load(Ordering::Relaxed) == next.ended {
            self.sleep(lock, next.until);
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Have the waiting threads check their requests, one of which was made before this.
    pub(crate) fn wake(&self) {
        // Release: pairs with the acquire of `next`, so that the check sees the request.
        self.ended.fetch_add(1, Ordering::Release);
        // As in `wait`.
        fence(Ordering::SeqCst);
        self.notify();
    }

    fn notify(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            // Taken so that a thread which found no reason to return is already waiting.
            drop(self.locked());
            self.changed.notify_all();
        }
    }

    #[cfg(not(loom))]
    fn locked(&self) -> Guard<'_> {
        self.lock.lock()
    }

    #[cfg(not(loom))]
    fn sleep(&self, mut lock: Guard<'_>, until: Option<Instant>) {
        match until {
            Some(until) => drop(self.changed.wait_until(&mut lock, until)),
            None => self.changed.wait(&mut lock),
        }
    }

    #[cfg(loom)]
    #[allow(clippy::unwrap_used, reason = "in a test")]
    fn locked(&self) -> Guard<'_> {
        self.lock.lock().unwrap()
    }

    #[cfg(loom)]
    #[allow(clippy::unwrap_used, reason = "in a test")]
    fn sleep(&self, lock: Guard<'_>, _until: Option<Instant>) {
        drop(self.changed.wait(lock).unwrap());
    }
}

impl TurnGuard<'_> {
    /// Until when this iteration may wait. It does not wait if another thread has performed one
    /// since this thread checked its requests.
    pub(crate) fn until(&self, next: NextTurn) -> Option<Instant> {
        // Relaxed: `begin` has acquired what the last leader wrote, and a wake-up that comes now
        // belongs to a request that the loop receives too.
        if self.turn_lock.ended.load(Ordering::Relaxed) == next.ended {
            next.until
        } else {
            Some(Instant::now())
        }
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        // If a callback has forked, the waiting threads exist only in the parent.
        if self.is_inner || self.process_tag.is_forked_child() {
            return;
        }
        // Release: pairs with the acquire of `next`.
        self.turn_lock.ended.fetch_add(1, Ordering::Release);
        // Release: pairs with the acquire of the next leader.
        self.turn_lock.leader.store(0, Ordering::Release);
        // As in `wait`.
        fence(Ordering::SeqCst);
        self.turn_lock.notify();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_iteration_that_has_ended_since_the_check_is_not_waited_for() {
        let turns = TurnLock::default();
        let next = turns.next();
        drop(turns.begin());
        let guard = turns.begin().unwrap();
        assert!(guard.until(next).is_some(), "the request may have been dispatched");
        assert_eq!(guard.until(turns.next()), None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(turns.begin().is_none());
                turns.wait(next);
            });
        });
    }

    #[test]
    fn a_woken_thread_returns_while_an_iteration_is_in_progress() {
        let turns = TurnLock::default();
        let (next, _guard) = (turns.next(), turns.begin().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| turns.wait(next));
            turns.wake();
        });
    }

    #[test]
    fn a_callback_continues_the_iteration_of_its_thread() {
        let turns = TurnLock::default();
        let next = turns.next();
        let outer = turns.begin().unwrap();
        drop(turns.begin().unwrap());
        assert_eq!(outer.until(next), None, "the inner one has not ended it");
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(turns.begin().is_none()));
        });
    }
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;

    /// What two threads wait for, each for its own, and the epoll set that reports it.
    #[derive(Default)]
    struct Loop {
        turns: TurnLock,
        /// Ready, not yet dispatched.
        ready: Mutex<[bool; 2]>,
        written: Condvar,
        dispatched: [AtomicBool; 2],
    }

    impl Loop {
        fn write(&self, number: usize) {
            self.ready.lock().unwrap()[number] = true;
            self.written.notify_all();
        }

        /// Wait until something is ready, and dispatch it. If nothing ever is, loom reports a
        /// deadlock.
        fn dispatch(&self, may_wait: bool) {
            let mut ready = self.ready.lock().unwrap();
            while may_wait && *ready == [false; 2] {
                ready = self.written.wait(ready).unwrap();
            }
            for (ready, dispatched) in ready.iter_mut().zip(&self.dispatched) {
                if std::mem::take(ready) {
                    dispatched.store(true, Ordering::Relaxed);
                }
            }
        }

        /// As a machine runs the loop until its own request has been dispatched.
        fn run(&self, number: usize) {
            loop {
                let next = self.turns.next();
                if self.dispatched[number].load(Ordering::Relaxed) {
                    return;
                }
                match self.turns.begin() {
                    Some(guard) => self.dispatch(guard.until(next).is_none()),
                    None => self.turns.wait(next),
                }
            }
        }
    }

    #[test]
    fn a_callback_that_stops_another_threads_run_can_wait_for_its_end() {
        loom::model(|| {
            let (turns, stopped) =
                (Arc::new(TurnLock::default()), Arc::new(AtomicBool::new(false)));
            let leading = turns.begin().unwrap();
            let other = {
                let (turns, stopped) = (Arc::clone(&turns), Arc::clone(&stopped));
                loom::thread::spawn(move || {
                    loop {
                        let next = turns.next();
                        if turns.is_led() && stopped.load(Ordering::Relaxed) {
                            return;
                        }
                        turns.wait(next);
                    }
                })
            };
            stopped.store(true, Ordering::Relaxed);
            turns.wake();
            other.join().unwrap();
            drop(leading);
        });
    }

    #[test]
    fn each_thread_hears_of_its_request_whoever_dispatches_it() {
        let mut model = loom::model::Builder::new();
        // Without a bound the model takes minutes.
        model.preemption_bound = Some(3);
        model.check(|| {
            let shared = Arc::new(Loop::default());
            let threads = [0, 1].map(|number| {
                let shared = Arc::clone(&shared);
                loom::thread::spawn(move || shared.run(number))
            });
            shared.write(0);
            shared.write(1);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }
}
