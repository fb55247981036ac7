//! What is behind a virtual disk: raw files, qcow2 images, bytes in memory, objects of the program,
//! copy-on-write overlays over any of them, and the frozen contents that snapshots keep. Nothing
//! here knows virtio. Any thread; a disk has one writer at a time.

mod backend;
mod blocks;
mod bytes;
#[allow(clippy::module_inception, reason = "it is where `Disk` is")]
mod disk;
mod extents;
mod frozen;
mod header;
mod history;
mod lock;
mod medium;
mod open;
mod overlay;
mod qcow2;
mod raw;
mod slices;
mod storage;

pub use backend::Backend;
pub use disk::{Disk, Session};
pub use frozen::Frozen;
pub use open::{Contents, Format, Layer, open};
pub use slices::{Slice, of_bytes, of_bytes_mut};
