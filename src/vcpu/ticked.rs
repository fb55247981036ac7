//! The effect of a tick: in a signal handler, on the thread that has set the timer.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

thread_local! {
    /// The `immediate_exit` flag of the vCPU that this thread runs with a timer.
    pub(super) static FLAG: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    pub(super) static HAS_TICKED: Cell<bool> = const { Cell::new(false) };
}

/// Called when the timer's signal arrives. The flag makes the next KVM_RUN fail, so that a tick
/// just before the guest is entered is not lost.
pub(super) fn on_tick() {
    HAS_TICKED.set(true);
    let flag = FLAG.get();
    if !flag.is_null() {
        // SAFETY: the thread that has set the pointer keeps the page mapped until it clears the
        // pointer. SeqCst: as for the flag of a kick.
        unsafe { &*flag }.store(1, Ordering::SeqCst);
    }
}
