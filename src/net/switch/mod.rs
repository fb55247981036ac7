//! A network inside the process: a learning switch whose links have conditions that can be changed
//! while it is used. Machines and programs are connected to its ports, each on its own thread.

mod backend;
mod conditions;
mod counts;
mod inbox;
mod lane;
mod link;
mod network;
mod parcel;
mod random;
mod state;

mod table;
mod wakeup;

#[cfg(test)]
mod tests;

pub use backend::PortBackend;
pub use conditions::Conditions;
pub use counts::{PortCounts, QueueLimit, ReceivedCounts, SentCounts};
pub use network::{FrozenNetwork, Network, Port};
pub use state::Direction;
