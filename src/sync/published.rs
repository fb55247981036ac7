//! A value that many threads read and that rarely changes. A reader keeps a copy of the pointer,
//! and takes the lock only after a change.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::rank::Rank;
use super::rwlock::RwLock;

/// See the module.
pub struct Published<T: ?Sized, R> {
    /// Counts the changes, under the lock.
    changes: AtomicU64,
    value: RwLock<Arc<T>, R>,
}

/// A reader's copy. It may keep a former value alive until it is used again.
#[derive(Debug)]
pub struct CachedArc<T: ?Sized>(Option<(u64, Arc<T>)>);

impl<T: ?Sized> Default for CachedArc<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: ?Sized, R> Published<T, R> {
    /// Publish a first value.
    pub const fn new(value: Arc<T>) -> Self {
        Self { changes: AtomicU64::new(0), value: RwLock::new(value) }
    }
}

impl<T: ?Sized, R: Rank> Published<T, R> {
    /// The current value.
    pub fn load(&self) -> Arc<T> {
        Arc::clone(&self.value.read())
    }

    /// Look at the current value, which does not change meanwhile.
    pub fn with<U>(&self, look: impl FnOnce(&T) -> U) -> U {
        look(&self.value.read())
    }

    /// The current value, as `copy` keeps it.
    pub fn read<'a>(&self, copy: &'a mut CachedArc<T>) -> &'a Arc<T> {
        // Acquire: pairs with the release in `change`, so that a reader that learns of a change in
        // another way finds it here.
        let changes = self.changes.load(Ordering::Acquire);
        if copy.0.as_ref().is_some_and(|(seen, _)| *seen != changes) {
            copy.0 = None;
        }
        let value = copy.0.get_or_insert_with(|| {
            let value = self.value.read();
            // Relaxed: it changes under the lock.
            (self.changes.load(Ordering::Relaxed), Arc::clone(&value))
        });
        &value.1
    }

    /// Replace the value by what `change` makes of it, which also returns a result of its own. The
    /// former value is returned too, so that the caller drops it without the lock.
    pub fn change<U>(&self, change: impl FnOnce(&Arc<T>) -> (Arc<T>, U)) -> (Arc<T>, U) {
        let mut value = self.value.write();
        let (new, result) = change(&value);
        let former = std::mem::replace(&mut *value, new);
        self.changes.fetch_add(1, Ordering::Release);
        (former, result)
    }
}

impl<T, R> Default for Published<[T], R> {
    fn default() -> Self {
        Self::new(Arc::new([]))
    }
}

impl<T: ?Sized + fmt::Debug, R> fmt::Debug for Published<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::rank;

    #[test]
    fn a_copy_follows_the_changes_and_lets_former_values_go() {
        let published = Published::<[u8], rank::Test>::default();
        let mut copy = CachedArc::default();
        assert!(published.read(&mut copy).is_empty());
        let (former, ()) = published.change(|_| (Arc::new([1, 2]), ()));
        assert!(former.is_empty() && Arc::strong_count(&former) == 2, "the copy has it still");
        assert_eq!(**published.read(&mut copy), [1, 2]);
        assert_eq!(Arc::strong_count(&former), 1);
        assert!(Arc::ptr_eq(&published.load(), published.read(&mut copy)));
    }

    #[test]
    fn a_reader_that_learns_of_a_change_finds_it() {
        let published = Arc::new(Published::<[u32], rank::Test>::default());
        let reported = Arc::new(AtomicU64::new(0));
        let reader = {
            let (published, reported) = (Arc::clone(&published), Arc::clone(&reported));
            std::thread::spawn(move || {
                let mut copy = CachedArc::default();
                let mut last = 0;
                while last < 1000 {
                    last = reported.load(Ordering::Acquire);
                    assert!(published.read(&mut copy).len() as u64 >= last);
                }
            })
        };
        for number in 1..=1000 {
            published.change(|former| (former.iter().copied().chain([1]).collect(), ()));
            reported.store(number, Ordering::Release);
        }
        reader.join().unwrap();
    }
}
