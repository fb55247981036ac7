//! What a tick changes: in the handler of a signal, on the thread that has set the timer.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs with a timer.
    pub(super) static FLAG: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    pub(super) static HAS_TICKED: Cell<bool> = const { Cell::new(false) };
}

/// The timer has sent its signal. The flag makes the next KVM_RUN fail, so that a tick which comes
/// just before the guest is entered is not lost.
pub(super) fn on_tick() {
    HAS_TICKED.set(true);
    let flag = FLAG.get();
    if !flag.is_null() {
        // SAFETY: whoever has set it keeps the page mapped for as long as it is there.
        // SeqCst: as for the flag of a kick.
        unsafe { &*flag }.store(1, Ordering::SeqCst);
    }
}
