//! A readers-writer lock with a rank.

use std::fmt;
use std::ops::{Deref, DerefMut};

use super::held::{Held, Place};
use super::rank::Rank;

/// A readers-writer lock of rank `R`.
pub struct RwLock<T, R> {
    place: Place<R>,
    lock: parking_lot::RwLock<T>,
}

/// The guard of an [`RwLock`], for reading or writing, depending on `G`.
#[derive(Debug)]
pub struct RwLockGuard<G, R: Rank> {
    guard: G,
    _held: Held<R>,
}

/// The guard of an [`RwLock`] for reading.
pub type ReadGuard<'a, T, R> = RwLockGuard<parking_lot::RwLockReadGuard<'a, T>, R>;
/// The guard of an [`RwLock`] for writing.
pub type WriteGuard<'a, T, R> = RwLockGuard<parking_lot::RwLockWriteGuard<'a, T>, R>;

impl<T, R> RwLock<T, R> {
    /// An unlocked lock.
    pub const fn new(value: T) -> Self {
        Self { place: Place::new(), lock: parking_lot::RwLock::new(value) }
    }
}

impl<T, R: Rank> RwLock<T, R> {
    /// Take the lock for reading. A thread that already holds it must not, because a writer may
    /// wait in between.
    pub fn read(&self) -> ReadGuard<'_, T, R> {
        self.place.check();
        RwLockGuard { guard: self.lock.read(), _held: Held::new(&self.place) }
    }

    /// Take the lock for writing.
    pub fn write(&self) -> WriteGuard<'_, T, R> {
        self.place.check();
        RwLockGuard { guard: self.lock.write(), _held: Held::new(&self.place) }
    }

    /// Take the lock for reading if no writer holds it or waits for it.
    pub fn try_read(&self) -> Option<ReadGuard<'_, T, R>> {
        let guard = self.lock.try_read()?;
        Some(RwLockGuard { guard, _held: Held::new(&self.place) })
    }

    /// Take the lock for writing if it is free.
    pub fn try_write(&self) -> Option<WriteGuard<'_, T, R>> {
        let guard = self.lock.try_write()?;
        Some(RwLockGuard { guard, _held: Held::new(&self.place) })
    }
}

impl<G: Deref, R: Rank> Deref for RwLockGuard<G, R> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut, R: Rank> DerefMut for RwLockGuard<G, R> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

impl<T: Default, R> Default for RwLock<T, R> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: fmt::Debug, R> fmt::Debug for RwLock<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lock.fmt(f)
    }
}
