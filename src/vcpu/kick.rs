//! The kick: how a vCPU is brought out of the guest, and the only place that touches signals.
//!
//! The kicker, under the handle's lock:
//!   1. sets the stop word;
//!   2. sets `immediate_exit` through its own mapping of the run page;
//!   3. sends the kick signal to the vCPU's thread, unless the vCPU is at rest.
//!
//! The vCPU's thread:
//!   4. looks at the stop word before each `KVM_RUN`;
//!   5. is returned by `KVM_RUN` with EINTR when the flag of point 2 is up on entry, or the signal of point 3
//!      arrives inside;
//!   6. looks at the stop word again: set, it leaves; clear, the signal was somebody else's and it goes on.
//!
//! No kick is lost: one that comes after point 4 and before the guest is entered finds the flag of point 2 on
//! entry; a later one finds the thread inside, where the signal reaches it. None cancels a later run: the
//! thread is joined, and then 7. the flag and the word are cleared under the same lock before the next start.

use std::os::unix::thread::JoinHandleExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::run_page::RunPage;
use crate::error::{Error, ErrorKind, Result};

/// The word of points 1, 4, 6 and 7.
#[derive(Debug, Default)]
pub(crate) struct StopWord(AtomicBool);

impl StopWord {
    /// Points 4 and 6.
    pub(crate) fn is_set(&self) -> bool {
        // SeqCst: one order with the flag of point 2, so that a thread which found the flag up finds the word.
        self.0.load(Ordering::SeqCst)
    }

    /// Point 7: the thread of the last run is gone, and nobody kicks before this returns.
    pub(crate) fn clear(&self, page: &RunPage) {
        page.set_immediate_exit(false);
        self.0.store(false, Ordering::SeqCst);
    }

    /// Points 1 to 3.
    pub(crate) fn kick<'a>(
        &self,
        page: &RunPage,
        running: impl FnOnce() -> Option<&'a JoinHandle<()>>,
    ) {
        self.0.store(true, Ordering::SeqCst);
        page.set_immediate_exit(true);
        // Asked only now: a thread found at rest takes the vCPU after point 1, and point 4 keeps it out.
        if let (Some(thread), Ok(signal)) = (running(), kick_signal()) {
            // SAFETY: the handle has not been joined, so its pthread_t is valid even if the thread has ended.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal) };
        }
    }
}

extern "C" fn ignore(_signal: libc::c_int) {}

/// The signal that kicks: the first real-time signal that had no handler when the first machine was made.
///
/// # Errors
/// When every real-time signal has a handler of the program's.
pub fn kick_signal() -> Result<libc::c_int> {
    static SIGNAL: OnceLock<Option<libc::c_int>> = OnceLock::new();
    SIGNAL.get_or_init(claim_signal).ok_or_else(|| {
        Error::new(
            ErrorKind::State,
            "sigaction",
            "every real-time signal is in use by this program",
        )
    })
}

fn claim_signal() -> Option<libc::c_int> {
    (libc::SIGRTMIN()..=libc::SIGRTMAX()).find(|signal| {
        // SAFETY: sigaction structs of zeros are valid, and the handler does nothing: it is there so that the
        // signal interrupts KVM_RUN, without SA_RESTART.
        unsafe {
            let mut present: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(*signal, std::ptr::null(), &raw mut present) != 0
                || present.sa_sigaction != libc::SIG_DFL
            {
                return false;
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as libc::sighandler_t;
            libc::sigaction(*signal, &raw const action, std::ptr::null_mut()) == 0
        }
    })
}

/// Leave the program's signals to its own threads: this one takes the kick and its own faults.
pub(crate) fn block_other_signals() {
    let Ok(kick) = kick_signal() else { return };
    // SAFETY: a local set, filled before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        let faults =
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];
        for signal in faults.into_iter().chain([kick]) {
            libc::sigdelset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}
