//! Networks: what is behind a network device, as backends that take and give Ethernet frames. No
//! virtio here. A backend is used by the thread of its machine's loop, and never waits.

mod backend;

pub use backend::{
    Checksum, Frame, FrozenNet, NetBackend, Offload, Offloads, Segmentation, Watched,
};
