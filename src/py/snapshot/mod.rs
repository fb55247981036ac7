//! `Snapshot` for Python: the crate's snapshot, with its configuration and its file.
//! `python/pyvmm/snapshots.py` has the pools and other code that need not be native. Runs on the
//! caller's thread; long operations release the GIL.

mod file;
mod object;

pub use object::PySnapshot;
