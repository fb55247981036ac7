//! What an allow-list and a policy consist of: protocols, ports, networks. Pure data.

use std::net::Ipv4Addr;

/// A protocol that is relayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// As a policy sees it: `tcp` or `udp`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A range of ports, with both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

impl Ports {
    /// Every port.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };
}

/// A line of the allow-list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// None allows both.
    pub protocol: Option<Protocol>,
    /// An address of the network that is allowed.
    pub network: Ipv4Addr,
    /// How many bits of `network` count.
    pub prefix: u8,
    /// The ports that are allowed.
    pub ports: Ports,
}

impl Rule {
    pub(super) fn allows(&self, protocol: Protocol, address: Ipv4Addr, port: u16) -> bool {
        self.protocol.is_none_or(|only| only == protocol)
            && in_network(address, self.network, self.prefix)
            && (self.ports.first..=self.ports.last).contains(&port)
    }
}

/// Whether an address is in a network.
pub(super) fn in_network(address: Ipv4Addr, network: Ipv4Addr, prefix: u8) -> bool {
    let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
    (address.to_bits() ^ network.to_bits()) & mask == 0
}

/// What the program's policy is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// For `UserNet::answer`.
    pub id: u64,
    /// The protocol.
    pub protocol: Protocol,
    /// The address that the guest has chosen.
    pub address: Ipv4Addr,
    /// The port that the guest has chosen.
    pub port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_says_how_many_bits_count() {
        let network = Ipv4Addr::new(10, 1, 2, 3);
        assert!(in_network(Ipv4Addr::new(10, 1, 2, 3), network, 32));
        assert!(!in_network(Ipv4Addr::new(10, 1, 2, 2), network, 32));
        assert!(in_network(Ipv4Addr::new(10, 1, 200, 3), network, 16));
        assert!(!in_network(Ipv4Addr::new(10, 2, 2, 3), network, 16));
        assert!(in_network(Ipv4Addr::BROADCAST, network, 0));
        assert!(!in_network(Ipv4Addr::BROADCAST, network, 200));
    }

    #[test]
    fn a_rule_without_a_protocol_is_for_both() {
        let ports = Ports { first: 80, last: 90 };
        let network = Ipv4Addr::new(192, 0, 2, 0);
        let rule = Rule { protocol: None, network, prefix: 24, ports };
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert!(rule.allows(protocol, network, 80) && rule.allows(protocol, network, 90));
            assert!(!rule.allows(protocol, network, 79) && !rule.allows(protocol, network, 91));
            assert!(!rule.allows(protocol, Ipv4Addr::new(192, 0, 3, 0), 80));
        }
        assert_eq!([Protocol::Tcp.name(), Protocol::Udp.name()], ["tcp", "udp"]);
        assert_eq!(Ports::ALL, Ports { first: 0, last: 65_535 });
    }
}
