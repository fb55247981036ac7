//! Guest memory: host mappings by guest-physical address, which are KVM's memory slots, and their
//! copy-on-write images in snapshots. vCPUs, devices and file formats are elsewhere. Any thread may
//! call this room. A guest may write the memory at any time.

mod access;
mod backing;
mod dirty;
mod discard;
mod freeze;
mod guest;
mod image;
mod layer;
mod map;
mod mapping;
mod moment;
mod pagemap;
mod ram;
pub(crate) mod ranges;
mod search;
mod slots;
mod table;
mod touched;
mod view;

pub(crate) use backing::host_memory;
pub use backing::{Backing, anonymous, shared};
pub use dirty::DirtyPages;
pub use guest::GuestMemory;
pub use image::{Image, MemoryRange, Run};
pub use layer::Layer;
pub(crate) use layer::{copy_to, memfd};
pub(crate) use mapping::{is_same, part};
pub(crate) use moment::Moment;
pub use table::Slot;
pub use view::{View, WritableView};
