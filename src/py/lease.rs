//! Tells a pool whether another job may use a machine: whether a job has changed it in a way that a
//! reset cannot undo, or still holds an object of it. Used with the GIL held, or while a thread
//! that holds it waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Changes of a machine that a reset cannot undo.
#[derive(Debug, Default)]
struct Changes {
    has_changed: AtomicBool,
    has_handed_out: AtomicBool,
}

/// Every Python object of a machine has one. By default an object calls [`Self::hand_out`].
#[derive(Clone, Debug, Default)]
pub(super) struct ReuseTracker {
    changes: Arc<Changes>,
    /// Counts the objects that were passed to a job.
    lease: Option<Lease>,
}

/// A reference for each object, and one more.
#[derive(Clone, Debug, Default)]
pub(super) struct Lease(Arc<()>);

impl Lease {
    /// Whether a job has released all objects that were passed to it.
    pub(super) fn is_over(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl ReuseTracker {
    /// The tracker for objects that are passed to a job.
    pub(super) fn lease_to(&self, lease: &Lease) -> Self {
        Self { changes: Arc::clone(&self.changes), lease: Some(lease.clone()) }
    }

    pub(super) fn is_leased(&self) -> bool {
        self.lease.is_some()
    }

    /// Record a change of the machine that a reset cannot undo.
    pub(super) fn change(&self) {
        // Relaxed: read with the GIL held, which orders it after this store.
        self.changes.has_changed.store(true, Ordering::Relaxed);
    }

    /// Record that an object is handed out that may change the machine later, without notice.
    pub(super) fn hand_out(&self) {
        // Relaxed, as above.
        self.changes.has_handed_out.store(true, Ordering::Relaxed);
    }

    /// Accept the changes so far as the initial state. Objects stay handed out.
    pub(super) fn accept_changes(&self) {
        self.changes.has_changed.store(false, Ordering::Relaxed);
    }

    /// Whether a reset undoes all changes.
    pub(super) fn is_clean(&self) -> bool {
        let Changes { has_changed, has_handed_out } = &*self.changes;
        // Relaxed, as above.
        !has_changed.load(Ordering::Relaxed) && !has_handed_out.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_over_when_nobody_holds_a_part() {
        let (tracker, lease) = (ReuseTracker::default(), Lease::default());
        let handle = tracker.lease_to(&lease);
        let part = handle.clone();
        assert!(handle.is_leased() && !tracker.is_leased());
        drop(handle);
        assert!(!lease.is_over());
        drop(part);
        assert!(lease.is_over());
    }

    #[test]
    fn changes_can_be_accepted_and_objects_that_were_handed_out_cannot() {
        let tracker = ReuseTracker::default();
        tracker.lease_to(&Lease::default()).change();
        assert!(!tracker.is_clean());
        tracker.accept_changes();
        assert!(tracker.is_clean());
        tracker.hand_out();
        tracker.accept_changes();
        assert!(!tracker.is_clean());
    }
}
