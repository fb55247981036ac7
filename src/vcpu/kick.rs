//! The kick, which brings a vCPU out of its guest. `signal.rs` has the signal that it uses.
//!
//! The kicker, under the handle's lock:
//!   1. sets the stop word;
//!   2. sets `immediate_exit` through its own mapping of the run page;
//!   3. sends the kick signal to the thread that runs the vCPU, unless it is at rest.
//!
//! The thread that runs the vCPU:
//!   4. checks the stop word before each `KVM_RUN`;
//!   5. returns from `KVM_RUN` with EINTR if the flag of point 2 is set on entry, or when the
//!      signal of point 3 arrives inside;
//!   6. checks the stop word again: if it is set, it leaves; otherwise the signal was not a kick
//!      and it continues.
//!
//!   8. may set the flag itself, to complete an instruction without running further; it then sets
//!      the flag to the value of the word and continues at point 4, which finds a kick that came in
//!      between.
//!
//! No kick is lost: one that comes after point 4 and before the guest is entered finds the flag of
//! point 2 on entry; a later one finds the thread inside, where the signal reaches it. None cancels
//! a later run: 7. the flag and the word are cleared under the same lock before a vCPU at rest is
//! run again.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering};

use super::signal;
use super::thread_id::ThreadId;

/// `kvm_run.immediate_exit` of a vCPU.
pub(crate) trait ImmediateExit {
    /// Points 2 and 7.
    fn set(&self, value: bool);
}

/// The word of points 1, 4, 6 and 7.
#[derive(Debug, Default)]
pub(crate) struct StopWord(AtomicBool);

impl StopWord {
    /// Points 4 and 6.
    pub(crate) fn is_set(&self) -> bool {
        // SeqCst: one order with the flag of point 2, so that a thread that found the flag set
        // finds the word set.
        self.0.load(Ordering::SeqCst)
    }

    /// Point 7: the vCPU is at rest, and the caller's lock keeps kicks out until this returns.
    pub(crate) fn clear(&self, flag: &impl ImmediateExit) {
        flag.set(false);
        self.0.store(false, Ordering::SeqCst);
    }

    /// Points 1 to 3. `signal` sends the kick signal unless the vCPU is at rest.
    pub(crate) fn kick(&self, flag: &impl ImmediateExit, signal: impl FnOnce()) {
        self.0.store(true, Ordering::SeqCst);
        flag.set(true);
        // Checked only now: if the vCPU is at rest, a thread that takes it later finds the word of
        // point 1 at point 4, and does not enter.
        signal();
    }
}

/// Interrupt the thread that runs a vCPU: point 3.
///
/// # Safety
/// The thread must not have ended: the caller holds a lock that the thread needs to end.
pub(crate) unsafe fn interrupt(thread: ThreadId) {
    // SAFETY: the caller guarantees that the thread exists.
    unsafe { signal::send(thread) };
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::{Arc, Condvar, Mutex};

    /// The kernel's side of a vCPU: the flag that `KVM_RUN` checks on entry, and the signal that
    /// interrupts it.
    #[derive(Default)]
    struct Kernel {
        immediate_exit: AtomicBool,
        signals: Mutex<usize>,
        came: Condvar,
    }

    impl ImmediateExit for Kernel {
        fn set(&self, value: bool) {
            self.immediate_exit.store(value, Ordering::SeqCst);
        }
    }

    impl Kernel {
        fn signal(&self) {
            *self.signals.lock().unwrap() += 1;
            self.came.notify_all();
        }

        /// The guest spins: this returns with EINTR or never. loom reports a sleep that never ends.
        fn run(&self) {
            let mut signals = self.signals.lock().unwrap();
            while !self.immediate_exit.load(Ordering::SeqCst) && *signals == 0 {
                signals = self.came.wait(signals).unwrap();
            }
            *signals = 0;
        }
    }

    fn turn(stop: &StopWord, kernel: &Kernel) {
        while !stop.is_set() {
            kernel.run();
        }
    }

    #[test]
    fn no_kick_is_lost_at_any_moment() {
        loom::model(|| {
            let shared = Arc::new((StopWord::default(), Kernel::default()));
            let vcpu = {
                let shared = Arc::clone(&shared);
                loom::thread::spawn(move || turn(&shared.0, &shared.1))
            };
            shared.0.kick(&shared.1, || shared.1.signal());
            vcpu.join().unwrap();
        });
    }

    #[test]
    fn two_kickers_end_one_run_and_none_later() {
        let mut model = loom::model::Builder::new();
        // Without a bound it takes minutes.
        model.preemption_bound = Some(3);
        model.check(|| {
            let shared = Arc::new((StopWord::default(), Kernel::default()));
            let kick = |shared: &Arc<(StopWord, Kernel)>| {
                let shared = Arc::clone(shared);
                loom::thread::spawn(move || shared.0.kick(&shared.1, || shared.1.signal()))
            };
            let kickers = [kick(&shared), kick(&shared)];
            turn(&shared.0, &shared.1);
            kickers.into_iter().for_each(|kicker| kicker.join().unwrap());
            shared.0.clear(&shared.1);
            assert!(!shared.0.is_set());
            assert!(!shared.1.immediate_exit.load(Ordering::SeqCst));
        });
    }
}
