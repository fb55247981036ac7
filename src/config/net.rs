//! The configuration of a network device. Pure data.

use crate::net::NetSource;

/// A network device.
#[derive(Debug)]
pub struct NetConfig {
    /// What is behind it.
    pub source: NetSource,
    /// Its number among its machine's network devices.
    pub number: usize,
    /// The guest's hardware address. None: one that is derived from the source and the number.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the guest is to use. None: what the backend says, or what the guest prefers.
    pub mtu: Option<u16>,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::VirtioConfig;
    use super::*;
    use crate::net::Disconnected;

    #[test]
    fn network_devices_are_numbered() {
        let net = |number| {
            let source = NetSource::Made(Arc::new(Disconnected));
            VirtioConfig::Net(NetConfig { source, number, mac: None, mtu: None })
        };
        assert_eq!(VirtioConfig::names(&[net(0), net(1)]), ["net0", "net1"]);
    }
}
