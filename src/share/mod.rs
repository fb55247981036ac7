//! A directory of the host for a guest: a 9P2000.L server, request bytes in and reply bytes out. It
//! knows no virtio. Every file is reached from the directory one name at a time, by openat2 beneath
//! what was reached before: no name and no symlink leads out of it. On one thread at a time.

mod change;
#[cfg(test)]
mod client;
mod directory;
mod entry;
mod fids;
mod lock;
mod message;
mod open;
mod read;
mod saved;
mod server;
mod system;
mod wire;

pub use directory::{Directory, Options};
pub use server::{LEAST_ROOM, MOST_BYTES, Server};
