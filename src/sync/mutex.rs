//! A mutex with a rank, and the condition variable that waits with it.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

use super::held::{Held, Place};
use super::rank::Rank;

/// A mutex of rank `R`.
pub struct Mutex<T, R> {
    place: Place<R>,
    lock: parking_lot::Mutex<T>,
}

/// The guard of a [`Mutex`].
#[derive(Debug)]
pub struct MutexGuard<'a, T, R: Rank> {
    guard: parking_lot::MutexGuard<'a, T>,
    held: Held<R>,
}

/// The guard of a [`Mutex`], for a part of its data.
#[derive(Debug)]
pub struct MappedMutexGuard<'a, T, R: Rank> {
    guard: parking_lot::MappedMutexGuard<'a, T>,
    _held: Held<R>,
}

impl<T, R> Mutex<T, R> {
    /// A mutex that is never held together with another of its rank.
    pub const fn new(value: T) -> Self {
        Self { place: Place::new(), lock: parking_lot::Mutex::new(value) }
    }

    /// One of several mutexes that a thread may hold together, taken in ascending order of numbers.
    pub const fn numbered(number: u64, value: T) -> Self {
        Self { place: Place::numbered(number), lock: parking_lot::Mutex::new(value) }
    }

    /// Access the data without locking, because the reference is exclusive.
    pub fn get_mut(&mut self) -> &mut T {
        self.lock.get_mut()
    }
}

impl<T, R: Rank> Mutex<T, R> {
    /// Take the lock, waiting for other holders.
    pub fn lock(&self) -> MutexGuard<'_, T, R> {
        self.place.check();
        MutexGuard { guard: self.lock.lock(), held: Held::new(&self.place) }
    }

    /// Take the lock, waiting at most this long.
    pub fn try_lock_for(&self, limit: Duration) -> Option<MutexGuard<'_, T, R>> {
        self.place.check();
        let guard = self.lock.try_lock_for(limit)?;
        Some(MutexGuard { guard, held: Held::new(&self.place) })
    }

    /// Take the lock if it is free. This never waits, so the rank does not matter.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T, R>> {
        let guard = self.lock.try_lock()?;
        Some(MutexGuard { guard, held: Held::new(&self.place) })
    }
}

impl<'a, T, R: Rank> MutexGuard<'a, T, R> {
    /// Release the lock while `f` runs.
    pub fn unlocked<U>(this: &mut Self, f: impl FnOnce() -> U) -> U {
        let Self { guard, held } = this;
        held.release_for_wait();
        let result = parking_lot::MutexGuard::unlocked(guard, || {
            let result = f();
            held.check();
            result
        });
        held.reacquire();
        result
    }

    /// Keep the lock for the part of the data that `f` returns. Release it if `f` returns None.
    pub fn try_map<U>(
        this: Self,
        f: impl FnOnce(&mut T) -> Option<&mut U>,
    ) -> Option<MappedMutexGuard<'a, U, R>> {
        let Self { guard, held } = this;
        let guard = parking_lot::MutexGuard::try_map(guard, f).ok()?;
        Some(MappedMutexGuard { guard, _held: held })
    }
}

impl<T, R: Rank> Deref for MutexGuard<'_, T, R> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T, R: Rank> DerefMut for MutexGuard<'_, T, R> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T, R: Rank> Deref for MappedMutexGuard<'_, T, R> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T, R: Rank> DerefMut for MappedMutexGuard<'_, T, R> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T: Default, R> Default for Mutex<T, R> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: fmt::Debug, R> fmt::Debug for Mutex<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lock.fmt(f)
    }
}

/// A condition variable for one [`Mutex`]. A waiting thread holds no other lock.
#[derive(Debug, Default)]
pub struct Condvar(parking_lot::Condvar);

impl Condvar {
    /// A condition variable without waiters.
    #[must_use]
    pub const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }

    /// Wait until it is notified.
    pub fn wait<T, R: Rank>(&self, guard: &mut MutexGuard<'_, T, R>) {
        guard.held.assert_alone();
        self.0.wait(&mut guard.guard);
    }

    /// Wait until this time at most. Returns whether it passed.
    pub fn wait_until<T, R: Rank>(&self, guard: &mut MutexGuard<'_, T, R>, until: Instant) -> bool {
        guard.held.assert_alone();
        self.0.wait_until(&mut guard.guard, until).timed_out()
    }

    /// Wait for this long at most. Returns whether the time passed.
    pub fn wait_for<T, R: Rank>(&self, guard: &mut MutexGuard<'_, T, R>, limit: Duration) -> bool {
        guard.held.assert_alone();
        self.0.wait_for(&mut guard.guard, limit).timed_out()
    }

    /// Wake all waiters.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[cfg(test)]
#[cfg(debug_assertions)]
mod tests {
    //! Covers src/sync/held.rs, src/sync/rank.rs, src/sync/rwlock.rs.

    use std::fs;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;

    use super::*;
    use crate::sync::{RwLock, assert_unlocked, rank};

    type Low = Mutex<u8, rank::Runner>;
    type High = Mutex<u8, rank::Vcpus>;

    /// The message with which `f` is refused.
    fn refusal(f: impl FnOnce()) -> String {
        match catch_unwind(AssertUnwindSafe(f)).map_err(|panic| panic.downcast()) {
            Err(Ok(text)) => *text,
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn locks_are_taken_in_the_order_of_their_ranks() {
        let (low, high) = (Low::default(), High::default());
        let _held = (low.lock(), high.lock());
        drop(_held);
        let _high = high.lock();
        let text = refusal(|| drop(low.lock()));
        assert_eq!(text, "locks: Runner is taken while Vcpus is held");
        assert!(low.try_lock().is_some(), "what waits for nobody may come in any order");
    }

    #[test]
    fn locks_of_one_rank_are_taken_in_the_order_of_their_numbers() {
        let (first, second) = (High::default(), High::default());
        let held = first.lock();
        assert!(refusal(|| drop(second.lock())).contains("Vcpus is taken while Vcpus is held"));
        drop(held);
        let vcpus = [0, 1].map(|number| Mutex::<_, rank::Vcpu>::numbered(number, ()));
        drop((vcpus[0].lock(), vcpus[1].lock()));
        let _held = vcpus[1].lock();
        assert!(refusal(|| drop(vcpus[0].lock())).contains("Vcpu is taken while Vcpu is held"));
    }

    #[test]
    fn nobody_waits_or_enters_python_with_a_lock_held() {
        let (low, high, condvar) = (Low::default(), High::default(), Condvar::new());
        assert_unlocked("a wait");
        let _low = low.lock();
        assert_eq!(refusal(|| assert_unlocked("a wait")), "locks: a wait while Runner is held");
        let mut guard = high.lock();
        let text = refusal(|| assert!(condvar.wait_for(&mut guard, Duration::ZERO)));
        assert_eq!(text, "locks: Vcpus is released for a wait while Runner is held");
    }

    #[test]
    fn a_lock_that_is_released_for_a_while_is_not_held() {
        let (low, high) = (Low::default(), High::default());
        let mut guard = high.lock();
        MutexGuard::unlocked(&mut guard, || {
            assert_unlocked("a wait");
            drop(low.lock());
        });
        assert!(refusal(|| assert_unlocked("a wait")).contains("Vcpus"));
        let mapped = MutexGuard::try_map(guard, |byte| Some(byte)).unwrap();
        assert!(refusal(|| assert_unlocked("a wait")).contains("Vcpus"));
        drop(mapped);
        assert_unlocked("a wait");
    }

    #[test]
    fn a_reader_counts_like_any_holder() {
        let (low, readers) = (Low::default(), RwLock::<u8, rank::Observers>::default());
        let _reader = readers.read();
        assert!(refusal(|| drop(low.lock())).contains("while Observers is held"));
        assert!(refusal(|| drop(readers.read())).contains("while Observers is held"));
    }

    #[test]
    fn the_documented_table_is_that_of_the_code() {
        let house = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = fs::read_to_string(house.join("docs/threads.md")).unwrap();
        let (_, section) = text.split_once("## The order of locks").unwrap();
        let rows = section.lines().filter(|line| line.starts_with("| `"));
        let rows: Vec<Vec<&str>> = rows
            .map(|row| row.split('|').map(|cell| cell.trim().trim_matches('`')).collect())
            .collect();
        let names: Vec<&str> = rows.iter().map(|row| row[1]).collect();
        let (_, ranks) = rank::ALL.split_last().unwrap();
        assert_eq!(
            names, ranks,
            "docs/threads.md against src/sync/rank.rs, but for the rank of tests"
        );
        for row in rows {
            let code = fs::read_to_string(house.join("src").join(row[2])).unwrap();
            assert!(code.contains(&format!("rank::{}", row[1])), "{} has no {}", row[2], row[1]);
            assert!(row[3..5].iter().all(|cell| !cell.is_empty()), "{row:?}");
        }
    }
}
