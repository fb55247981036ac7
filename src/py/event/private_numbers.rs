//! Which eventfds and timers are known by their numbers to the binding alone. To make a descriptor
//! blocking, a program needs its number. Until it has it, a plain read of a nonblocking descriptor
//! cannot wait, and takes three quarters of the time of a read that refuses to wait. Any thread,
//! with the GIL.

use std::io;
use std::os::fd::RawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::poll::{read_count, take_count};

const WORDS: usize = 1024;

/// A bit for each number. Higher numbers are never private. The bit of a number is valid while an
/// `EventFd` or a `TimerFd` has it: creating one sets or clears it.
static PRIVATE: [AtomicU64; WORDS] = [const { AtomicU64::new(0) }; WORDS];

fn bit(fd: RawFd) -> Option<(&'static AtomicU64, u64)> {
    let number = usize::try_from(fd).ok()?;
    Some((PRIVATE.get(number / 64)?, 1 << (number % 64)))
}

/// A child shares the descriptors, and may learn their numbers from its copies of the objects.
extern "C" fn before_fork() {
    // Relaxed, here and below: with the GIL held, as at `os.fork()`.
    PRIVATE.iter().for_each(|word| word.store(0, Ordering::Relaxed));
}

/// Note a new nonblocking descriptor, whose number nobody else knows.
pub(super) fn keep_private(fd: RawFd) {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // SAFETY: the handler only stores to atomics.
        unsafe { libc::pthread_atfork(Some(before_fork), None, None) };
    });
    if let Some((word, bit)) = bit(fd) {
        word.fetch_or(bit, Ordering::Relaxed);
    }
}

/// The number, for the program, which may make the descriptor blocking from now on.
pub(super) fn give_out(fd: RawFd) -> RawFd {
    if let Some((word, bit)) = bit(fd) {
        word.fetch_and(!bit, Ordering::Relaxed);
    }
    fd
}

/// Take the count without waiting, also if the program has made the descriptor blocking.
pub(super) fn take(fd: RawFd) -> io::Result<u64> {
    if is_private(fd) { read_count(fd) } else { take_count(fd) }
}

fn is_private(fd: RawFd) -> bool {
    bit(fd).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_private_until_it_is_given_out_and_others_do_not_change() {
        // Numbers that no test of this process opens.
        let (one, other) = (64_000, 64_001);
        assert!(!is_private(one));
        keep_private(one);
        keep_private(other);
        assert!(is_private(one) && is_private(other));
        assert_eq!(give_out(one), one);
        assert!(!is_private(one) && is_private(other));
        give_out(other);
    }

    #[test]
    fn numbers_beyond_the_table_are_never_private() {
        for number in [-1, RawFd::MAX, 1 << 16] {
            keep_private(number);
            assert!(!is_private(number));
            assert_eq!(give_out(number), number);
        }
    }
}
