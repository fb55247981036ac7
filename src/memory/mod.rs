//! Guest memory: host mappings by guest-physical address, told to KVM as slots, and the
//! copy-on-write images that snapshots keep of it. No vCPU, no device and no file format here. Any
//! thread may call it; a guest may write the bytes at any time.

mod backing;
mod guest;
mod image;
mod map;
mod mapping;
pub(crate) mod pagemap;
pub(crate) mod ram;
mod slots;
mod view;

pub(crate) use backing::host_memory;
pub use backing::{Backing, anonymous, shared};
pub use guest::GuestMemory;
pub use image::{Image, Layer, MemoryRange, Run};
pub(crate) use image::{copy_to, memfd};
pub(crate) use mapping::part;
pub use slots::{DirtyPages, Slot};
pub use view::View;
