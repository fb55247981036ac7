//! Distinguishes a forked child from its parent. KVM ties a VM to the process that created it, and
//! a child shares an epoll set with its parent, so objects record the process that created them.

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result as Checked};

static FORKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_fork() {
    // Relaxed: the child has only one thread.
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Identifies the process that created an object, by the number of forks before it. Cheaper than
/// getpid(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessTag(u64);

impl ProcessTag {
    /// This process.
    pub(crate) fn current() -> Self {
        static REGISTERED: Once = Once::new();
        REGISTERED.call_once(|| {
            // SAFETY: the handler only adds to an atomic, which is safe in the child of a
            // multi-threaded process.
            unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
        });
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// The number of forks before the process.
    #[cfg(debug_assertions)]
    pub(crate) fn number(self) -> u64 {
        self.0
    }

    /// Whether this is a forked child's copy of an object of the parent.
    pub(crate) fn is_forked_child(self) -> bool {
        // Relaxed: as in the handler, which was registered for this tag.
        self.0 != FORKS.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`ErrorKind::State`] in a forked child.
    pub(crate) fn check(self, what: &str) -> Checked<()> {
        if !self.is_forked_child() {
            return Ok(());
        }
        let detail = format!("this {what} belongs to the process that forked this one");
        Err(Error::new(ErrorKind::State, "fork", detail).hint("make a new one after the fork"))
    }
}

/// A value that is computed once and never changes. Several threads may compute it at the same
/// time, and the first result is kept. No thread waits for another: a lock or a `Once` that another
/// thread held at a fork would block the child forever.
pub(crate) struct OnceBox<T>(AtomicPtr<T>, PhantomData<Box<T>>);

impl<T> OnceBox<T> {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()), PhantomData)
    }

    pub(crate) fn get(&self) -> Option<&T> {
        // Acquire: pairs with the release in `get_or_try_init`, so that the value is complete.
        let known = self.0.load(Ordering::Acquire);
        // SAFETY: null, or a value that `get_or_try_init` has leaked. It lives until this is
        // dropped, and never changes.
        unsafe { known.as_ref() }
    }

    /// The value. `init` computes it.
    ///
    /// # Errors
    /// Those of `init`.
    pub(crate) fn get_or_try_init<E>(&self, init: impl FnOnce() -> Result<T, E>) -> Result<&T, E>
    where
        T: Send,
    {
        if let Some(known) = self.get() {
            return Ok(known);
        }
        let new = Box::into_raw(Box::new(init()?));
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        // Acquire and release: as in `get`; another thread may have been first.
        let known = match self.0.compare_exchange(ptr::null_mut(), new, success, failure) {
            Ok(_) => new,
            Err(first) => {
                // SAFETY: it was leaked above, and no other thread has seen it.
                drop(unsafe { Box::from_raw(new) });
                first
            }
        };
        // SAFETY: as in `get`, and not null.
        Ok(unsafe { &*known })
    }
}

impl<T> OnceBox<T> {
    /// The value. `init` computes it and cannot fail.
    pub(crate) fn get_or_init(&self, init: impl FnOnce() -> T) -> &T
    where
        T: Send,
    {
        match self.get_or_try_init(|| Ok::<_, Infallible>(init())) {
            Ok(known) => known,
            Err(never) => match never {},
        }
    }
}

impl<T> Drop for OnceBox<T> {
    fn drop(&mut self) {
        let known = *self.0.get_mut();
        if !known.is_null() {
            // SAFETY: `get_or_try_init` leaked it, and the exclusive reference shows that no other
            // reference is left.
            drop(unsafe { Box::from_raw(known) });
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for OnceBox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnceBox").field(&self.get()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_stays() {
        let value = OnceBox::new();
        assert_eq!(value.get(), None);
        assert_eq!(value.get_or_try_init(|| Err(1)), Err(1));
        assert_eq!(value.get_or_try_init(|| Ok::<_, ()>(String::from("first"))).unwrap(), "first");
        assert_eq!(value.get_or_try_init(|| Ok::<_, ()>(String::from("second"))).unwrap(), "first");
        let shared = &OnceBox::new();
        std::thread::scope(|scope| {
            let init = |number: usize| shared.get_or_try_init(|| Ok::<_, ()>(number)).unwrap();
            let all: Vec<_> = (0..8).map(|number| scope.spawn(move || init(number))).collect();
            let all: Vec<_> = all.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(all.iter().all(|found| std::ptr::eq(*found, all[0])));
        });
    }

    #[test]
    fn a_forked_child_is_told_from_its_parent() {
        let process_tag = ProcessTag::current();
        process_tag.check("machine").unwrap();
        // SAFETY: the child only compares two integers and exits without running code of the
        // parent.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(process_tag.is_forked_child())) };
        }
        let mut status = 0;
        // SAFETY: our own child, and a status that lives through the call.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(libc::WEXITSTATUS(status), 1);
        assert!(!process_tag.is_forked_child());
    }
}
