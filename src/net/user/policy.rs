//! Which destinations the guest may reach: fixed rules, the allow-list, and whether the program is
//! to be asked. Pure decisions, no I/O.

use std::net::Ipv4Addr;

use super::config::UserNetConfig;
use super::rules::{Protocol, Rule, in_network};

/// What becomes of a connection or datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Ask,
    Deny,
}

/// Where a destination leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The resolver that the host uses.
    Resolver,
    /// The host's loopback interface.
    Loopback,
    /// Any other address.
    Outside(Ipv4Addr),
}

const DNS_PORT: u16 = 53;

/// Where a destination leads. None: nowhere.
pub(super) fn place_of(config: &UserNetConfig, address: Ipv4Addr, port: u16) -> Option<Place> {
    if address == config.dns {
        return (config.relay_dns && port == DNS_PORT).then_some(Place::Resolver);
    }
    if port == 0 {
        return None;
    }
    if address == config.gateway {
        return Some(Place::Loopback);
    }
    let first = address.octets()[0];
    let is_own = in_network(address, config.gateway, config.prefix);
    if is_own || first == 0 || first == 127 || first >= 224 {
        return None;
    }
    Some(Place::Outside(address))
}

/// Whether the guest may reach a destination.
pub(super) fn judge(
    config: &UserNetConfig,
    protocol: Protocol,
    (address, port): (Ipv4Addr, u16),
) -> Verdict {
    let Some(place) = place_of(config, address, port) else { return Verdict::Deny };
    let listed = |rules: &[Rule]| rules.iter().any(|rule| rule.allows(protocol, address, port));
    // Only a rule that is not for a whole network around it opens what is closed by default.
    let named = |network: Ipv4Addr, prefix: u8| {
        config.allow.iter().flatten().any(|rule| {
            rule.prefix >= prefix
                && in_network(rule.network, network, prefix)
                && rule.allows(protocol, address, port)
        })
    };
    let allowed = match place {
        Place::Resolver => true,
        Place::Loopback if config.host_loopback => {
            config.allow.as_deref().is_none_or(listed) || named(config.gateway, 32)
        }
        Place::Loopback => named(config.gateway, 32),
        Place::Outside(address) if address.is_link_local() => {
            named(Ipv4Addr::new(169, 254, 0, 0), 16)
        }
        Place::Outside(_) => config.allow.as_deref().is_none_or(listed),
    };
    match (allowed, config.ask) {
        (false, _) => Verdict::Deny,
        (true, true) => Verdict::Ask,
        (true, false) => Verdict::Allow,
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::Ports;
    use super::*;

    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
    const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

    fn rule(network: Ipv4Addr, prefix: u8, first: u16, last: u16) -> Rule {
        Rule { protocol: None, network, prefix, ports: Ports { first, last } }
    }

    fn tcp(config: &UserNetConfig, address: Ipv4Addr, port: u16) -> Verdict {
        judge(config, Protocol::Tcp, (address, port))
    }

    #[test]
    fn by_default_the_outside_and_dns_are_open_and_the_host_is_not() {
        let config = UserNetConfig::default();
        assert_eq!(tcp(&config, OUTSIDE, 80), Verdict::Allow);
        assert_eq!(tcp(&config, config.dns, 53), Verdict::Allow);
        assert_eq!(tcp(&config, config.dns, 54), Verdict::Deny);
        assert_eq!(tcp(&config, config.gateway, 80), Verdict::Deny);
        assert_eq!(tcp(&config, METADATA, 80), Verdict::Deny);
        for address in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255; 4], [10, 0, 2, 99]] {
            assert_eq!(tcp(&config, address.into(), 80), Verdict::Deny, "{address:?}");
        }
        assert_eq!(tcp(&config, OUTSIDE, 0), Verdict::Deny);
    }

    #[test]
    fn the_loopback_is_opened_by_its_option_or_by_name() {
        let open = UserNetConfig { host_loopback: true, ..UserNetConfig::default() };
        assert_eq!(tcp(&open, open.gateway, 80), Verdict::Allow);
        let named = UserNetConfig {
            allow: Some(vec![rule(open.gateway, 32, 80, 80)]),
            ..UserNetConfig::default()
        };
        assert_eq!(tcp(&named, named.gateway, 80), Verdict::Allow);
        assert_eq!(tcp(&named, named.gateway, 81), Verdict::Deny);
        let all = rule(Ipv4Addr::UNSPECIFIED, 0, 0, u16::MAX);
        let around = UserNetConfig { allow: Some(vec![all]), ..UserNetConfig::default() };
        assert_eq!(tcp(&around, around.gateway, 80), Verdict::Deny);
        assert_eq!(tcp(&around, METADATA, 80), Verdict::Deny);
        assert_eq!(tcp(&around, OUTSIDE, 80), Verdict::Allow);
    }

    #[test]
    fn an_allow_list_closes_everything_else_but_dns() {
        let mut only = rule(Ipv4Addr::new(192, 0, 2, 0), 24, 80, 443);
        only.protocol = Some(Protocol::Tcp);
        let config = UserNetConfig { allow: Some(vec![only]), ..UserNetConfig::default() };
        assert_eq!(tcp(&config, OUTSIDE, 80), Verdict::Allow);
        assert_eq!(tcp(&config, OUTSIDE, 444), Verdict::Deny);
        assert_eq!(judge(&config, Protocol::Udp, (OUTSIDE, 80)), Verdict::Deny);
        assert_eq!(tcp(&config, Ipv4Addr::new(192, 0, 3, 7), 80), Verdict::Deny);
        assert_eq!(tcp(&config, config.dns, 53), Verdict::Allow);
        let silent = UserNetConfig { relay_dns: false, ..config };
        assert_eq!(tcp(&silent, silent.dns, 53), Verdict::Deny);
    }

    #[test]
    fn a_policy_is_asked_only_for_what_is_otherwise_allowed() {
        let config = UserNetConfig { ask: true, ..UserNetConfig::default() };
        assert_eq!(tcp(&config, OUTSIDE, 80), Verdict::Ask);
        assert_eq!(tcp(&config, config.dns, 53), Verdict::Ask);
        assert_eq!(tcp(&config, config.gateway, 80), Verdict::Deny);
    }
}
