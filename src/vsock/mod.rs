//! Stream sockets between guest and host: connections with their credit, the sockets of the host at
//! their other ends, and Firecracker's convention of unix sockets. Knows no virtio: packets come
//! and go as headers and pieces of memory. On the loop's thread; the device's lock protects it.

mod backlog;
mod connection;
mod credit;
mod handshake;
mod hosts;
mod model;
mod mux;
mod mux_tests;
mod packet;
mod socket;
mod testing;
mod watch;

pub use credit::BUFFER;
pub use hosts::UnixSocket;
pub use mux::{MAX_CONNECTIONS, Mux};
pub use packet::{HEADER_SIZE, HOST_CID, Header, STREAM, op};
pub use socket::HostSocket;
