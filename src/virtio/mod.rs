//! virtio 1.2 over MMIO: the transport, the queues, and the devices. What is behind a device, such
//! as a disk, is in a room of its own and knows no virtio. vCPU threads access the registers; the
//! loop's thread processes the queues, and a device may have a thread for what blocks.

mod abandoned;
mod access;
mod attach;
mod balloon;
mod blk;
mod blk_config;
mod blk_limit;
mod blk_reach;
mod blk_request;
mod blk_worker;
mod buffers;
mod bus_device;
mod chain;
mod console;
mod console_control;
mod console_port;
mod create;
mod custom;
mod device;
mod doorbells;
mod fs9p;
mod fs9p_worker;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
mod net;
mod net_control;
mod net_features;
mod net_link;
mod net_receive;
mod net_tests;
mod net_transmit;
mod net_watch;
mod place;
mod queue;
mod queues;
mod registers;
mod rng;
mod state;
mod subscriber;
mod transport;
mod vsock;
mod vsock_driver;
mod vsock_tests;
mod worker;

pub use access::QueueAccess;
pub use attach::Attached;
pub(crate) use attach::{Board, attach};
pub use balloon::Balloon;
pub use blk::Blk;
pub use blk_worker::DiskCounts;
pub use buffers::{ChainReader, ChainWriter, Slices};
pub use chain::{BrokenChain, Chain, Segment, Segments};
pub use console::Console;
pub(crate) use create::{create, restored};
pub use custom::{Custom, Happened};
pub use device::{Frozen, VirtioDevice};
pub use fs9p::Fs9p;
pub use net::Net;
pub use net_link::NetCounts;
pub use place::Place;
pub use queues::{Counts, Queues};
pub use rng::Rng;
pub use transport::Transport;
pub use vsock::Vsock;
