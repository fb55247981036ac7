//! The events fetched for Python objects, between a dispatch and their delivery, each with the
//! token of its subscriber. Filled under the crate manager's lock, where no Python code may run.

use std::cell::UnsafeCell;
use std::hash::Hasher;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::hop::hop;
use event_manager::{EventOps, Events, MutEventSubscriber};

/// An event fetched for a Python subscriber and not yet delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueuedEvent {
    pub(crate) token: u64,
    pub(crate) events: Events,
    /// The manager's count of removals before the event was fetched.
    pub(crate) removals: u64,
}

/// A source whose count is read just before its subscriber is called.
pub(crate) trait Drain: Send + Sync + std::fmt::Debug {
    /// Read the count. Does not wait.
    fn take(&self) -> io::Result<u64>;
}

/// The events that dispatches have fetched for Python. The crate manager's lock protects them,
/// because its subscribers are called with this lock held; another lock would have to be taken for
/// each event.
#[derive(Debug, Default)]
pub(crate) struct EventQueue(UnsafeCell<Vec<QueuedEvent>>);

// SAFETY: the callers of both methods hold the same lock, so two threads never access the vector at
// the same time.
unsafe impl Sync for EventQueue {}

impl EventQueue {
    /// # Safety
    /// The caller holds the lock of the manager of these events.
    unsafe fn push(&self, ready: QueuedEvent) {
        // SAFETY: under the lock there is no other reference to the vector.
        unsafe { &mut *self.0.get() }.push(ready);
    }

    /// Take the events, in exchange for an empty vector.
    ///
    /// # Safety
    /// As for `push`.
    pub(crate) unsafe fn swap(&self, empty: &mut Vec<QueuedEvent>) {
        // SAFETY: as in `push`.
        std::mem::swap(unsafe { &mut *self.0.get() }, empty);
    }
}

/// Represents a Python object in the crate's manager.
pub(crate) struct QueueingSubscriber {
    pub(crate) token: u64,
    pub(crate) removals: Arc<AtomicU64>,
    pub(crate) queue: Arc<EventQueue>,
}

impl MutEventSubscriber for QueueingSubscriber {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        hop!();
        // Acquire: pairs with the release of the thread that removed a registration.
        let removals = self.removals.load(Ordering::Acquire);
        let ready = QueuedEvent { token: self.token, events, removals };
        // SAFETY: only the crate's manager calls this, with its lock held.
        unsafe { self.queue.push(ready) };
    }

    fn init(&mut self, _ops: &mut EventOps) {}
}

/// A hasher for tokens, which are consecutive numbers.
#[derive(Debug, Default)]
pub(crate) struct TokenHasher(u64);

impl Hasher for TokenHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_i32(&mut self, fd: i32) {
        self.write_u64(u64::from(fd.cast_unsigned()));
    }

    fn write_u64(&mut self, token: u64) {
        // The hash table also uses the highest bits.
        self.0 = token.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
