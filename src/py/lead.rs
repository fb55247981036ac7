//! Machines that share a loop turn it on a thread each, but only one of them at a time fetches
//! events and delivers them: what is ready is delivered once. The others wait until it has made its
//! turn.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::process::Birthplace;
use crate::sync::{Condvar, Mutex, rank};

/// How long a thread waits for another's turn at most: then it looks at signals.
const SLICE: Duration = Duration::from_millis(50);

/// Which thread makes a turn.
#[derive(Debug, Default)]
pub(super) struct Lead {
    /// The leader's number, 0 without one.
    leader: AtomicU64,
    waiting: AtomicUsize,
    lock: Mutex<(), rank::Lead>,
    changed: Condvar,
}

/// A turn in progress.
pub(super) struct Leading<'a> {
    lead: &'a Lead,
    /// Begun in a callback of another turn of this thread's, which stays the leader.
    is_inner: bool,
    birthplace: Birthplace,
}

/// A number of this thread's own: the address of something that it alone has.
fn this_thread() -> u64 {
    thread_local! {
        static MARK: u8 = const { 0 };
    }
    MARK.with(|mark| std::ptr::from_ref(mark) as u64)
}

impl Lead {
    /// Begin a turn, unless another thread makes one.
    pub(super) fn begin(&self) -> Option<Leading<'_>> {
        let (this, birthplace) = (this_thread(), Birthplace::here());
        // Acquire: what the last leader has done is seen. SeqCst besides, for one order with
        // `waiting`.
        match self.leader.compare_exchange(0, this, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Some(Leading { lead: self, is_inner: false, birthplace }),
            Err(leader) if leader == this => {
                Some(Leading { lead: self, is_inner: true, birthplace })
            }
            Err(_) => None,
        }
    }

    /// Wait until the turn in progress has been made, or this time at most. Without the GIL: the
    /// turn may need it.
    pub(super) fn wait(&self, deadline: Option<Instant>) {
        let slice = Instant::now() + SLICE;
        let until = deadline.map_or(slice, |deadline| deadline.min(slice));
        let mut lock = self.lock.lock();
        // SeqCst, here and at the end of a turn: either that one sees somebody waiting, or the
        // leader is found gone.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        if self.leader.load(Ordering::SeqCst) != 0 {
            self.changed.wait_until(&mut lock, until);
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        // In a child that a callback has forked, those who wait are its parent's.
        if self.is_inner || self.birthplace.is_foreign() {
            return;
        }
        self.lead.leader.store(0, Ordering::SeqCst);
        if self.lead.waiting.load(Ordering::SeqCst) > 0 {
            // Taken, so that who has seen a leader is waiting by now.
            drop(self.lead.lock.lock());
            self.lead.changed.notify_all();
        }
    }
}
