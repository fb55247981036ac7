//! Machines that share a loop run it on one thread each, but only one thread at a time fetches and
//! delivers events, so that an event is delivered once. The others wait until that iteration ends.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::process::ProcessTag;
use crate::sync::{Condvar, Mutex, rank};

/// The longest wait for another thread's iteration; then the caller checks for signals.
const MAX_WAIT: Duration = Duration::from_millis(50);

/// Held by the thread that performs an iteration.
#[derive(Debug, Default)]
pub(crate) struct TurnLock {
    /// The holder's number, or 0.
    leader: AtomicU64,
    waiting: AtomicUsize,
    lock: Mutex<(), rank::TurnLock>,
    changed: Condvar,
}

/// An iteration in progress.
pub(crate) struct TurnGuard<'a> {
    turn_lock: &'a TurnLock,
    /// Whether a callback of this thread took the lock again; the outer guard keeps it.
    is_inner: bool,
    process_tag: ProcessTag,
}

/// A number that identifies this thread: the address of one of its thread-local variables.
fn this_thread() -> u64 {
    thread_local! {
        static MARK: u8 = const { 0 };
    }
    MARK.with(|mark| std::ptr::from_ref(mark) as u64)
}

impl TurnLock {
    /// Begin an iteration, unless another thread performs one.
    pub(crate) fn begin(&self) -> Option<TurnGuard<'_>> {
        let (this, process_tag) = (this_thread(), ProcessTag::current());
        // Acquire, to see everything the last leader did. SeqCst, for a single order with
        // `waiting`.
        match self.leader.compare_exchange(0, this, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Some(TurnGuard { turn_lock: self, is_inner: false, process_tag }),
            Err(leader) if leader == this => {
                Some(TurnGuard { turn_lock: self, is_inner: true, process_tag })
            }
            Err(_) => None,
        }
    }

    /// Wait for the iteration in progress, or until this time at most. Called without the GIL,
    /// which the iteration may need.
    pub(crate) fn wait(&self, deadline: Option<Instant>) {
        let slice = Instant::now() + MAX_WAIT;
        let until = deadline.map_or(slice, |deadline| deadline.min(slice));
        let mut lock = self.lock.lock();
        // SeqCst, here and at the end of an iteration: either the leader sees a waiting thread, or
        // this thread sees that the leader is gone.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        if self.leader.load(Ordering::SeqCst) != 0 {
            self.changed.wait_until(&mut lock, until);
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        // If a callback has forked, the waiting threads exist only in the parent.
        if self.is_inner || self.process_tag.is_forked_child() {
            return;
        }
        self.turn_lock.leader.store(0, Ordering::SeqCst);
        if self.turn_lock.waiting.load(Ordering::SeqCst) > 0 {
            // Taken so that a thread which saw the leader is already waiting.
            drop(self.turn_lock.lock.lock());
            self.turn_lock.changed.notify_all();
        }
    }
}
