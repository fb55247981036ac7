//! Telling a forked child from its parent: KVM ties a machine to the process that made it, and an epoll set is
//! shared with the parent, so objects remember where they were made.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

static FORKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_fork() {
    // Relaxed: in the child there is one thread.
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// The process that an object was made in: how many forks lie before it. Cheaper to ask than getpid(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Birthplace(u64);

impl Birthplace {
    /// This process.
    pub(crate) fn here() -> Self {
        static REGISTERED: Once = Once::new();
        REGISTERED.call_once(|| {
            // SAFETY: the handler only adds to an atomic, which is safe in a forked child of many threads.
            unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
        });
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Whether this is a forked child's copy of what its parent made.
    pub(crate) fn is_foreign(self) -> bool {
        self != Self::here()
    }

    /// # Errors
    /// [`ErrorKind::State`] in a forked child.
    pub(crate) fn check(self, what: &str) -> Result<()> {
        if !self.is_foreign() {
            return Ok(());
        }
        let detail = format!("this {what} belongs to the process that forked this one");
        Err(Error::new(ErrorKind::State, "fork", detail).hint("make a new one after the fork"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_is_told_from_its_parent() {
        let birthplace = Birthplace::here();
        birthplace.check("machine").unwrap();
        // SAFETY: the child only compares two integers and leaves without running anything of its parent's.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(birthplace.is_foreign())) };
        }
        let mut status = 0;
        // SAFETY: our own child, and a status that lives through the call.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(libc::WEXITSTATUS(status), 1);
        assert!(!birthplace.is_foreign());
    }
}
