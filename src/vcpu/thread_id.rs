//! `ThreadId`: a thread by the kernel's number, and the signals that are sent to it. C libraries
//! other than glibc have no function that sends a value with a signal to a thread, so both ways are
//! system calls. Any thread.

use std::cell::Cell;
use std::ffi::c_void;
use std::time::Duration;

use crate::process::ProcessTag;

/// A thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadId(libc::pid_t);

thread_local! {
    /// This thread's number. A forked child is another thread, with a copy of this.
    static OWN: Cell<Option<(ProcessTag, ThreadId)>> = const { Cell::new(None) };
}

/// `siginfo_t` of a signal with a value.
#[repr(C)]
struct QueuedSignal {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    _align: libc::c_int,
    pid: libc::pid_t,
    uid: libc::uid_t,
    value: *mut c_void,
    _rest: [u64; 12],
}

const _: () = assert!(size_of::<QueuedSignal>() == size_of::<libc::siginfo_t>());

impl ThreadId {
    /// This thread. A system call only at first.
    pub(crate) fn current() -> Self {
        let process = ProcessTag::current();
        if let Some((_, own)) = OWN.get().filter(|(known, _)| *known == process) {
            return own;
        }
        // SAFETY: takes nothing and cannot fail.
        let own = Self(unsafe { libc::gettid() });
        OWN.set(Some((process, own)));
        own
    }

    /// The CPU time that it has used, its guest's included; `None` if it has ended.
    pub(super) fn cpu_time(self) -> Option<Duration> {
        /// The clock of one thread, that its scheduler counts: the kernel's `CPUCLOCK_PERTHREAD`
        /// and `CPUCLOCK_SCHED`, of which glibc makes the same number.
        const OF_THREAD: libc::clockid_t = 0b110;
        let clock = !self.0 << 3 | OF_THREAD;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes the structure, which lives through the call.
        let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
        let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
        (result == 0).then_some(Duration::new(seconds.ok()?, nanos.ok()?))
    }

    /// Send a signal to it. Returns false if the kernel refuses.
    ///
    /// # Safety
    /// The thread must not have ended, because the kernel gives its number to another one.
    pub(super) unsafe fn signal(self, signal: libc::c_int) -> bool {
        // SAFETY: numbers only; the thread exists, by the caller.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal) == 0 }
    }

    /// Send a signal to it that carries a value. Returns false if the kernel refuses.
    ///
    /// # Safety
    /// As for [`Self::signal`].
    pub(super) unsafe fn queue(self, signal: libc::c_int, value: *mut c_void) -> bool {
        // SAFETY: these calls take nothing and cannot fail.
        let (pid, uid) = unsafe { (libc::getpid(), libc::getuid()) };
        let (errno, code) = (0, libc::SI_QUEUE);
        let info = QueuedSignal { signal, errno, code, _align: 0, pid, uid, value, _rest: [0; 12] };
        // SAFETY: the kernel reads the structure during the call; the thread exists, by the caller.
        let sent = unsafe {
            libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, self.0, signal, &raw const info)
        };
        sent == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_thread_grows_while_it_computes() {
        let own = ThreadId::current();
        let before = own.cpu_time().unwrap();
        while own.cpu_time().unwrap() == before {}
        assert!(own.cpu_time().unwrap() > before);
    }

    #[test]
    fn a_thread_has_one_number_and_others_have_others() {
        let own = ThreadId::current();
        assert_eq!(own, ThreadId::current());
        let other = std::thread::spawn(ThreadId::current).join().unwrap();
        assert_ne!(own, other);
    }

    #[test]
    fn a_forked_child_has_a_number_of_its_own() {
        let parent = ThreadId::current();
        // SAFETY: the child makes system calls only, and ends.
        let status = unsafe {
            match libc::fork() {
                0 => {
                    let own = ThreadId::current();
                    libc::_exit(i32::from(own == parent || own.0 != libc::gettid()));
                }
                child => {
                    let mut status = -1;
                    assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                    status
                }
            }
        };
        assert_eq!(status, 0);
    }

    #[test]
    fn a_signal_arrives_with_its_value() {
        let value = std::ptr::dangling_mut::<c_void>();
        // SAFETY: a local set and siginfo; this thread blocks the signal, and takes it from there.
        unsafe {
            let signal = libc::SIGRTMAX() - 1;
            let mut wanted: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut wanted);
            libc::sigaddset(&raw mut wanted, signal);
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const wanted, &raw mut before);
            let mut info: libc::siginfo_t = std::mem::zeroed();
            assert!(ThreadId::current().queue(signal, value));
            assert_eq!(libc::sigwaitinfo(&raw const wanted, &raw mut info), signal);
            assert_eq!((info.si_code, info.si_value().sival_ptr), (libc::SI_QUEUE, value));
            assert_eq!((info.si_pid(), info.si_uid()), (libc::getpid(), libc::getuid()));
            assert!(ThreadId::current().signal(signal));
            assert_eq!(libc::sigwaitinfo(&raw const wanted, &raw mut info), signal);
            assert_ne!(info.si_code, libc::SI_QUEUE);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        }
    }
}
