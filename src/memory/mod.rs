//! Guest memory: host mappings by guest-physical address, which KVM has as slots, and the
//! copy-on-write images that snapshots keep of it. No vCPU, no device and no file format here. Any
//! thread may call it; a guest may write the bytes at any time.

mod access;
mod backing;
mod dirty;
mod freeze;
mod guest;
mod image;
mod layer;
mod map;
mod mapping;
mod pagemap;
mod ram;
pub(crate) mod ranges;
mod search;
mod slots;
mod table;
mod view;

pub(crate) use backing::host_memory;
pub use backing::{Backing, anonymous, shared};
pub use dirty::DirtyPages;
pub use guest::GuestMemory;
pub use image::{Image, MemoryRange, Run};
pub use layer::Layer;
pub(crate) use layer::{copy_to, memfd};
pub(crate) use mapping::{is_same, part};
pub use table::Slot;
pub use view::{View, WritableView};
