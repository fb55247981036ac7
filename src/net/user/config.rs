//! What a user network is configured with, and its validation. No I/O is here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::rules::{Protocol, Rule, in_network};
use crate::error::{Error, ErrorKind, Result};

/// A port of the host that leads to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The protocol.
    pub protocol: Protocol,
    /// The address of the host to listen at. Port 0: the host chooses one.
    pub host: SocketAddr,
    /// The port of the guest.
    pub guest_port: u16,
}

/// A user network. The default is QEMU's: 10.0.2.0/24, the gateway is .2, DNS .3, the guest .15.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserNetConfig {
    /// The address of the gateway, which is the host's loopback interface for the guest.
    pub gateway: Ipv4Addr,
    /// How many bits of the gateway's address are the network's.
    pub prefix: u8,
    /// The address that the guest gets.
    pub guest: Ipv4Addr,
    /// The address that answers DNS queries.
    pub dns: Ipv4Addr,
    /// Whether it does.
    pub relay_dns: bool,
    /// Where DNS queries go, instead of to the host's resolver.
    pub resolver: Option<SocketAddr>,
    /// The name of the guest that the DHCP server gives.
    pub hostname: Option<String>,
    /// The MTU that a driver is offered. One that does not accept it has 1500 at most. The DHCP
    /// server gives what results.
    pub mtu: u16,
    /// The ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// What the guest may reach. None: everything outside the host.
    pub allow: Option<Vec<Rule>>,
    /// Whether the guest may reach the host's loopback interface, at the gateway's address.
    pub host_loopback: bool,
    /// Whether the program decides about each connection.
    pub ask: bool,
    /// The most TCP connections at a time.
    pub max_connections: usize,
    /// The most UDP flows at a time. Above it, the one that was idle longest ends.
    pub max_flows: usize,
}

impl Default for UserNetConfig {
    fn default() -> Self {
        Self {
            gateway: Ipv4Addr::new(10, 0, 2, 2),
            prefix: 24,
            guest: Ipv4Addr::new(10, 0, 2, 15),
            dns: Ipv4Addr::new(10, 0, 2, 3),
            relay_dns: true,
            resolver: None,
            hostname: None,
            mtu: 65_520,
            forwards: Vec::new(),
            allow: None,
            host_loopback: false,
            ask: false,
            max_connections: 512,
            max_flows: 256,
        }
    }
}

impl UserNetConfig {
    /// # Errors
    /// [`ErrorKind::Config`] if addresses are not usable together or a limit is out of range.
    pub fn validate(&self, at: &str) -> Result<()> {
        let bad = |key: &str, detail: String| {
            Err(Error::new(ErrorKind::Config, format!("{at}.{key}"), detail))
        };
        if !(1..=30).contains(&self.prefix) {
            return bad("network", format!("/{} is not between /1 and /30", self.prefix));
        }
        let hosts = u32::MAX >> self.prefix;
        for (key, address) in [("gateway", self.gateway), ("guest", self.guest), ("dns", self.dns)]
        {
            let host = address.to_bits() & hosts;
            if !in_network(address, self.gateway, self.prefix) || host == 0 || host == hosts {
                let detail = format!("{address} is no host of {}/{}", self.gateway, self.prefix);
                return bad(key, detail);
            }
            if address.is_multicast() || address.is_loopback() || address.octets()[0] == 0 {
                return bad(key, format!("{address} cannot be a host's address"));
            }
        }
        if self.gateway == self.guest || self.gateway == self.dns || self.guest == self.dns {
            return bad("guest", "gateway, guest and DNS need an address each".into());
        }
        if !(576..=65_520).contains(&self.mtu) {
            return bad("mtu", format!("{} is not between 576 and 65520", self.mtu));
        }
        if self.hostname.as_deref().is_some_and(|name| !is_hostname(name)) {
            return bad("hostname", "not a name of letters, digits, hyphens and dots".into());
        }
        self.validate_limits(&bad)
    }

    fn validate_limits(&self, bad: &dyn Fn(&str, String) -> Result<()>) -> Result<()> {
        for (key, value) in
            [("max_connections", self.max_connections), ("max_flows", self.max_flows)]
        {
            if !(1..=4096).contains(&value) {
                return bad(key, format!("{value} is not between 1 and 4096"));
            }
        }
        if self.forwards.len() > 256 {
            return bad("forward", format!("{} ports are more than 256", self.forwards.len()));
        }
        if self.forwards.iter().any(|forward| forward.guest_port == 0) {
            return bad("forward", "port 0 of the guest is none".into());
        }
        match self.resolver.map(|resolver| resolver.ip()) {
            Some(ip) if ip.is_unspecified() || is_multicast(ip) => {
                bad("resolver", format!("{ip} is no address of a resolver"))
            }
            _ => Ok(()),
        }
    }

    /// The same network for a fork: the host chooses the ports that it listens at, because the
    /// original still has those that are configured.
    #[must_use]
    pub fn for_fork(&self) -> Self {
        let mut config = self.clone();
        for forward in &mut config.forwards {
            forward.host.set_port(0);
        }
        config
    }
}

fn is_multicast(ip: IpAddr) -> bool {
    ip.is_multicast()
}

fn is_hostname(name: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    !name.is_empty() && name.len() <= 63 && name.chars().all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(config: &UserNetConfig) -> String {
        config.validate("nets[0]").unwrap_err().to_string()
    }

    #[test]
    fn the_default_is_valid() {
        UserNetConfig::default().validate("nets[0]").unwrap();
    }

    #[test]
    fn an_error_names_the_key() {
        let good = UserNetConfig::default();
        let guest = |address| UserNetConfig { guest: address, ..good.clone() };
        assert!(error(&guest(Ipv4Addr::new(10, 0, 3, 15))).contains("nets[0].guest"));
        assert!(error(&guest(Ipv4Addr::new(10, 0, 2, 255))).contains("no host"));
        assert!(error(&guest(good.dns)).contains("an address each"));
        let prefix = UserNetConfig { prefix: 31, ..good.clone() };
        assert!(error(&prefix).contains("nets[0].network"));
        let mtu = UserNetConfig { mtu: 68, ..good.clone() };
        assert!(error(&mtu).contains("nets[0].mtu"));
        let name = UserNetConfig { hostname: Some("a b".into()), ..good.clone() };
        assert!(error(&name).contains("nets[0].hostname"));
        let limit = UserNetConfig { max_connections: 0, ..good.clone() };
        assert!(error(&limit).contains("nets[0].max_connections"));
        let resolver = UserNetConfig { resolver: "0.0.0.0:53".parse().ok(), ..good };
        assert!(error(&resolver).contains("nets[0].resolver"));
    }

    #[test]
    fn a_fork_listens_at_other_ports() {
        let host = "127.0.0.1:8080".parse().unwrap();
        let forward = Forward { protocol: Protocol::Tcp, host, guest_port: 80 };
        let config = UserNetConfig { forwards: vec![forward], ..UserNetConfig::default() };
        assert_eq!(config.for_fork().forwards[0].host.port(), 0);
    }
}
