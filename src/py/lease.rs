//! What tells a pool whether a machine may go to another job: what the program has done to it that
//! a reset does not take back, and whether anybody still holds an object that leads to it. With the
//! GIL held, or while somebody who holds it waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the program has done to a machine, beyond what a reset takes back.
#[derive(Debug, Default)]
struct Traces {
    has_changed: AtomicBool,
    has_handed_out: AtomicBool,
}

/// Every object of Python's that leads to a machine has one. An object that does not know better
/// calls [`Self::hand_out`].
#[derive(Clone, Debug, Default)]
pub(super) struct Tie {
    traces: Arc<Traces>,
    /// Of objects that a job was given: counts them.
    lease: Option<Lease>,
}

/// As many as there are objects, and one more.
#[derive(Clone, Debug, Default)]
pub(super) struct Lease(Arc<()>);

impl Lease {
    /// Whether a job has let go of everything that it was given.
    pub(super) fn is_over(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl Tie {
    /// For the objects that a job is given.
    pub(super) fn lend(&self, lease: &Lease) -> Self {
        Self { traces: Arc::clone(&self.traces), lease: Some(lease.clone()) }
    }

    pub(super) fn is_lent(&self) -> bool {
        self.lease.is_some()
    }

    /// The machine is changed in a way that a reset does not take back.
    pub(super) fn change(&self) {
        // Relaxed: looked at with the GIL held, by which this has been done.
        self.traces.has_changed.store(true, Ordering::Relaxed);
    }

    /// Somebody gets what may change the machine later, and does not say when.
    pub(super) fn hand_out(&self) {
        // Relaxed, as above.
        self.traces.has_handed_out.store(true, Ordering::Relaxed);
    }

    /// What was changed up to here is how the machine is to be. What was handed out stays so.
    pub(super) fn settle(&self) {
        self.traces.has_changed.store(false, Ordering::Relaxed);
    }

    /// Whether a reset brings back everything.
    pub(super) fn is_clean(&self) -> bool {
        let Traces { has_changed, has_handed_out } = &*self.traces;
        // Relaxed, as above.
        !has_changed.load(Ordering::Relaxed) && !has_handed_out.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_over_when_nobody_holds_a_part() {
        let (tie, lease) = (Tie::default(), Lease::default());
        let handle = tie.lend(&lease);
        let part = handle.clone();
        assert!(handle.is_lent() && !tie.is_lent());
        drop(handle);
        assert!(!lease.is_over());
        drop(part);
        assert!(lease.is_over());
    }

    #[test]
    fn what_is_changed_can_be_settled_and_what_is_handed_out_cannot() {
        let tie = Tie::default();
        tie.lend(&Lease::default()).change();
        assert!(!tie.is_clean());
        tie.settle();
        assert!(tie.is_clean());
        tie.hand_out();
        tie.settle();
        assert!(!tie.is_clean());
    }
}
