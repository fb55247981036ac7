//! User-mode networking: a gateway that needs no privilege. The guest's TCP connections and UDP
//! datagrams go out through sockets of this process; a DHCP server, a relay of DNS queries and the
//! forwarding of ports are ours, TCP is smoltcp's. Everything runs on the thread that calls it,
//! which is a loop's, and nothing here waits. No virtio here.

mod backend;
mod config;
mod core;
mod dhcp;
mod forward;
mod frame;
mod gateway;
mod host;
mod icmp;
mod link;
mod outbox;
mod policy;
mod reassembly;
mod resolver;
mod rules;
mod stack;
mod tcp;
mod tcp_table;
mod timers;
mod udp;

pub use backend::UserBackend;
pub use config::{Forward, UserNetConfig};
pub use frame::{Frame, Offload};
pub use gateway::UserNet;
pub use rules::{Ports, Protocol, Question, Rule};
pub use stack::Offloads;

#[cfg(test)]
mod tests {
    //! A guest with smoltcp's stack against sockets of this host.
    //! Covers src/net/user/backend.rs, src/net/user/core.rs, src/net/user/forward.rs.
    //! Covers src/net/user/gateway.rs, src/net/user/icmp.rs, src/net/user/stack.rs.
    //! Covers src/net/user/tcp.rs, src/net/user/tcp_table.rs, src/net/user/udp.rs.
    //! Covers src/net/user/tests/backend.rs, src/net/user/tests/guest.rs.
    //! Covers src/net/user/tests/hostile.rs, src/net/user/tests/policy.rs.
    //! Covers src/net/user/tests/relay.rs, src/net/user/tests/stream.rs.

    mod backend;
    mod guest;
    mod hostile;
    mod policy;
    mod relay;
    mod stream;
}
