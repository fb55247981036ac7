//! The host's resolver, as /etc/resolv.conf names it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

const FILE: &str = "/etc/resolv.conf";
/// The file is read again after this time.
const FRESH: Duration = Duration::from_secs(10);
const DNS_PORT: u16 = 53;

/// Which server gets the guest's DNS queries.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    servers: Vec<SocketAddr>,
    read: Option<Instant>,
    turn: usize,
}

impl Resolver {
    /// The server for the next query.
    pub(super) fn server(&mut self, now: Instant) -> SocketAddr {
        if self.read.is_none_or(|read| now.saturating_duration_since(read) > FRESH) {
            self.servers = servers(&std::fs::read_to_string(FILE).unwrap_or_default());
            self.read = Some(now);
        }
        // As the C library does it without a file.
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, DNS_PORT));
        let turn = self.turn % self.servers.len().max(1);
        self.servers.get(turn).copied().unwrap_or(local)
    }

    /// The last server does not answer: take the next one.
    pub(super) fn advance(&mut self) {
        self.turn = self.turn.wrapping_add(1);
    }
}

/// Addresses with a scope are left out.
fn servers(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok())
        .map(|address| SocketAddr::from((address, DNS_PORT)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_are_those_of_the_file_in_order() {
        let text = "# nameserver 1.1.1.1\nsearch a.example\nnameserver 192.0.2.1 # one\n\
                    nameserver\t2001:db8::1\nnameserver fe80::1%eth0\nnameserver x\n";
        let found: Vec<String> = servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53"]);
    }

    #[test]
    fn the_next_server_has_its_turn_after_a_failure() {
        let mut resolver = Resolver {
            servers: servers("nameserver 192.0.2.1\nnameserver 192.0.2.2"),
            read: Some(Instant::now()),
            turn: 0,
        };
        let now = Instant::now();
        assert_eq!(resolver.server(now).to_string(), "192.0.2.1:53");
        resolver.advance();
        assert_eq!(resolver.server(now).to_string(), "192.0.2.2:53");
        resolver.advance();
        assert_eq!(resolver.server(now).to_string(), "192.0.2.1:53");
    }
}
