//! `GuestMemory` for Python, with its slots, dirty pages and views. Checks and accesses themselves
//! are in `src/memory`. On the caller's thread, from any thread; a guest may write the bytes at any
//! time.

mod copy;
mod dirty;
mod guest;
mod slot;
mod view;

pub use dirty::PyDirtyPages;
pub use guest::PyGuestMemory;
pub use slot::PyMemorySlot;
