//! Snapshots: everything a guest can see of its machine, frozen without a copy of its memory, and
//! the file it is saved to. `vmm/snapshot.rs` takes and applies them in order; pages are frozen and
//! mapped in `memory`. Nothing here runs a guest. Any thread, with the vCPUs stopped by the caller.

pub(crate) mod chips;
pub(crate) mod confined;
pub(crate) mod cpuid;
mod file;
mod header;
mod host;
mod load;
mod msrs;
mod new_file;
mod pages;
mod plan;
mod save;
#[allow(clippy::module_inception, reason = "it is where `Snapshot` is")]
mod snapshot;
mod state;
pub(crate) mod translations;
pub(crate) mod vcpu;
mod virtio;

pub use file::inspect;
pub use header::Header;
pub use host::Host;
pub use load::{Load, load};
pub use pages::described;
pub use snapshot::Snapshot;
pub(crate) use snapshot::{given_key, new_id};
pub use state::{DeviceState, Record, RecordKind, Records};
pub(crate) use vcpu::VcpuStateFormat;
pub use virtio::VirtioDeviceState;
