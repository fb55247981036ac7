//! The locks of pyvmm: parking_lot's, each with a rank in its type. A debug build checks that every
//! thread takes them in the order of their ranks, and that it holds none while it waits or enters
//! Python. In a release build the checks cost nothing. No state of a machine is here. Any thread.

mod held;
mod mutex;
mod published;
pub mod rank;
mod rwlock;

pub use held::assert_unlocked;
pub use mutex::{Condvar, MappedMutexGuard, Mutex, MutexGuard};
pub use published::{CachedArc, Published};
pub use rwlock::{ReadGuard, RwLock, RwLockGuard, WriteGuard};
