//! Tracks which locks a thread holds, and checks their order. A release build contains none of
//! this.

#[cfg(debug_assertions)]
pub use self::checked::assert_unlocked;
#[cfg(debug_assertions)]
pub(super) use self::checked::{Held, Place};
#[cfg(not(debug_assertions))]
pub use self::unchecked::assert_unlocked;
#[cfg(not(debug_assertions))]
pub(super) use self::unchecked::{Held, Place};

#[cfg(debug_assertions)]
mod checked {
    use std::cell::RefCell;
    use std::marker::PhantomData;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::rank::Rank;
    use crate::process::ProcessTag;

    /// The position of a lock in the order.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct Entry {
        rank: usize,
        number: Option<u64>,
        name: &'static str,
    }

    thread_local! {
        /// The locks that this thread holds, in the order in which it took them.
        static HELD: RefCell<Vec<Entry>> = const { RefCell::new(Vec::new()) };
    }

    /// While a thread's thread-local values are dropped, its held locks are unknown, and nothing is
    /// checked.
    fn with_held<T>(f: impl FnOnce(&mut Vec<Entry>) -> T) -> Option<T> {
        HELD.try_with(|held| f(&mut held.borrow_mut())).ok()
    }

    // A violated order is a bug that no caller can handle, in a build that is meant to find it.
    #[allow(clippy::panic)]
    fn violated(text: &str) -> ! {
        panic!("locks: {text}")
    }

    fn push(entry: Entry) {
        with_held(|held| held.push(entry));
    }

    fn pop(entry: Entry) {
        with_held(|held| {
            if let Some(at) = held.iter().rposition(|other| *other == entry) {
                held.remove(at);
            }
        });
    }

    fn check(entry: Entry) {
        let highest = with_held(|held| held.iter().max().copied()).flatten();
        let Some(held) = highest else { return };
        let is_next = held.rank == entry.rank
            && held.number.zip(entry.number).is_some_and(|(held, next)| held < next);
        if held.rank >= entry.rank && !is_next {
            violated(&format!("{} is taken while {} is held", entry.name, held.name));
        }
    }

    /// This thread holds no lock here: it waits for another thread, or enters Python.
    #[track_caller]
    pub fn assert_unlocked(what: &str) {
        let held = with_held(|held| held.last().copied()).flatten();
        if let Some(held) = held {
            violated(&format!("{what} while {} is held", held.name));
        }
    }

    /// The place of a lock in the order.
    #[derive(Debug)]
    pub(in super::super) struct Place<R> {
        number: Option<u64>,
        rank: PhantomData<R>,
        /// The process that first took the lock, as one more than the number of earlier forks, or
        /// 0.
        process: AtomicU64,
    }

    impl<R> Place<R> {
        pub(in super::super) const fn new() -> Self {
            Self { number: None, rank: PhantomData, process: AtomicU64::new(0) }
        }

        pub(in super::super) const fn numbered(number: u64) -> Self {
            Self { number: Some(number), rank: PhantomData, process: AtomicU64::new(0) }
        }
    }

    impl<R: Rank> Place<R> {
        fn entry(&self) -> Entry {
            Entry { rank: R::NUMBER, number: self.number, name: R::NAME }
        }

        /// Check that this thread may wait for the lock now.
        pub(in super::super) fn check(&self) {
            self.check_process();
            check(self.entry());
        }

        /// In a forked child, a thread of the parent may hold the parent's lock forever.
        fn check_process(&self) {
            let here = ProcessTag::current().number() + 1;
            // Relaxed: the number is only compared, and protects no data.
            let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
            let first = self.process.compare_exchange(0, here, success, failure);
            if first.is_err_and(|first| first != here) {
                violated(&format!("{}, of the parent's, is taken in a forked child", R::NAME));
            }
        }
    }

    /// Records a lock that this thread holds, until it is dropped.
    #[derive(Debug)]
    pub(in super::super) struct Held<R: Rank> {
        entry: Entry,
        rank: PhantomData<R>,
    }

    impl<R: Rank> Held<R> {
        pub(in super::super) fn new(place: &Place<R>) -> Self {
            push(place.entry());
            Self { entry: place.entry(), rank: PhantomData }
        }

        pub(in super::super) fn check(&self) {
            check(self.entry);
        }

        pub(in super::super) fn release_for_wait(&self) {
            pop(self.entry);
        }

        pub(in super::super) fn reacquire(&self) {
            push(self.entry);
        }

        /// A waiting thread releases this lock, and must hold no other.
        pub(in super::super) fn assert_alone(&self) {
            let other = |held: &mut Vec<Entry>| held.iter().find(|e| **e != self.entry).copied();
            if let Some(other) = with_held(other).flatten() {
                let (name, other) = (self.entry.name, other.name);
                violated(&format!("{name} is released for a wait while {other} is held"));
            }
        }
    }

    impl<R: Rank> Drop for Held<R> {
        fn drop(&mut self) {
            pop(self.entry);
        }
    }
}

#[cfg(not(debug_assertions))]
mod unchecked {
    use std::marker::PhantomData;

    use super::super::rank::Rank;

    /// This thread holds no lock here: it waits for another thread, or enters Python.
    #[inline(always)]
    pub fn assert_unlocked(_what: &str) {}

    #[derive(Debug)]
    pub(in super::super) struct Place<R>(PhantomData<R>);

    impl<R> Place<R> {
        pub(in super::super) const fn new() -> Self {
            Self(PhantomData)
        }

        pub(in super::super) const fn numbered(_number: u64) -> Self {
            Self(PhantomData)
        }

        #[inline(always)]
        pub(in super::super) fn check(&self) {}
    }

    #[derive(Debug)]
    pub(in super::super) struct Held<R: Rank>(PhantomData<R>);

    impl<R: Rank> Held<R> {
        #[inline(always)]
        pub(in super::super) fn new(_place: &Place<R>) -> Self {
            Self(PhantomData)
        }

        #[inline(always)]
        pub(in super::super) fn check(&self) {}

        #[inline(always)]
        pub(in super::super) fn release_for_wait(&self) {}

        #[inline(always)]
        pub(in super::super) fn reacquire(&self) {}

        #[inline(always)]
        pub(in super::super) fn assert_alone(&self) {}
    }
}
