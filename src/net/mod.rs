//! Networks: what is behind a network device, as backends that take and give Ethernet frames. No
//! virtio here. A backend is used by the thread of its machine's loop, and never waits.

mod backend;
mod datagram;
mod disconnected;
mod ending;
pub mod header;
pub mod offload;
mod pcap;
mod queue;
mod socket;
mod source;
mod stream;
pub mod switch;
mod tap;
pub mod user;

pub use backend::{
    Checksum, Frame, FrozenNet, NetBackend, Offload, Offloads, Segmentation, Watched,
};
pub use datagram::DatagramSocket;
pub use disconnected::Disconnected;
pub use pcap::Capture;
pub use queue::FrameQueue;
pub use socket::Peer;
pub use source::NetSource;
pub use stream::StreamSocket;
pub use tap::Tap;
