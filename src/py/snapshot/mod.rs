//! `Snapshot` for Python: the crate's snapshot, with the configuration it was taken with and the
//! file it came from. `python/pyvmm/snapshots.py` holds pools and what else needs no native code.
//! On the caller's thread; whatever takes long releases the GIL.

mod file;
mod fork;
mod object;
mod vmm;

pub use object::PySnapshot;
