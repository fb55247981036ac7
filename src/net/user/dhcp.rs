//! The DHCP server: each hardware address gets an address of the network, the first one the one
//! that is configured. Leases are kept while the network exists.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr,
    EthernetAddress,
};

use super::config::UserNetConfig;
use super::frame::{ETHERNET, udp, write_ethernet};
use super::link::GATEWAY_MAC;
use super::outbox::Outbox;

pub(super) const SERVER_PORT: u16 = DHCP_SERVER_PORT;
/// A day, as QEMU's user network gives it.
const LEASE_SECONDS: u32 = 86_400;
/// As many addresses are given at most.
const MOST: u32 = 100;
const OPTION_HOSTNAME: u8 = 12;
const OPTION_MTU: u8 = 26;

/// The leases.
#[derive(Clone, Debug, Default)]
pub(super) struct Dhcp {
    leases: HashMap<EthernetAddress, Ipv4Addr>,
}

impl Dhcp {
    /// Answer a message of a client.
    pub(super) fn process(
        &mut self,
        (config, mtu): (&UserNetConfig, u16),
        payload: &[u8],
        outbox: &mut Outbox,
    ) {
        let Ok(packet) = DhcpPacket::new_checked(payload) else { return };
        let Ok(request) = DhcpRepr::parse(&packet) else { return };
        let Some((kind, address)) = self.answer(config, &request) else { return };
        let mtu_bytes = mtu.to_be_bytes();
        let hostname = config.hostname.as_deref().unwrap_or_default();
        let options = [
            DhcpOption { kind: OPTION_MTU, data: &mtu_bytes },
            DhcpOption { kind: OPTION_HOSTNAME, data: hostname.as_bytes() },
        ];
        let named = if hostname.is_empty() { 1 } else { 2 };
        let mut reply = reply_to(&request, config, kind, address);
        if kind != DhcpMessageType::Nak {
            reply.additional_options = &options[..named];
        }
        if config.relay_dns && kind != DhcpMessageType::Nak {
            reply.dns_servers = Some([config.dns].into_iter().collect());
        }
        send((config, mtu), &reply, outbox);
    }

    fn answer(
        &mut self,
        config: &UserNetConfig,
        request: &DhcpRepr<'_>,
    ) -> Option<(DhcpMessageType, Ipv4Addr)> {
        let mac = request.client_hardware_address;
        if !mac.is_unicast() || request.server_identifier.is_some_and(|id| id != config.gateway) {
            return None;
        }
        match request.message_type {
            DhcpMessageType::Discover => Some((DhcpMessageType::Offer, self.lease(config, mac)?)),
            DhcpMessageType::Request => {
                let wanted = request.requested_ip.unwrap_or(request.client_ip);
                let leased = self.lease(config, mac)?;
                let kind =
                    if wanted == leased { DhcpMessageType::Ack } else { DhcpMessageType::Nak };
                Some((kind, leased))
            }
            DhcpMessageType::Inform => Some((DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED)),
            DhcpMessageType::Release => {
                self.leases.remove(&mac);
                None
            }
            _ => None,
        }
    }

    fn lease(&mut self, config: &UserNetConfig, mac: EthernetAddress) -> Option<Ipv4Addr> {
        if let Some(address) = self.leases.get(&mac) {
            return Some(*address);
        }
        let hosts = u32::MAX >> config.prefix;
        let network = config.guest.to_bits() & !hosts;
        let first = config.guest.to_bits() & hosts;
        let free = (0..=MOST.min(hosts))
            .map(|n| Ipv4Addr::from_bits(network | ((first + n) & hosts)))
            .find(|ip| self.is_free(config, *ip, hosts))?;
        self.leases.insert(mac, free);
        Some(free)
    }

    fn is_free(&self, config: &UserNetConfig, ip: Ipv4Addr, hosts: u32) -> bool {
        let host = ip.to_bits() & hosts;
        let is_taken = ip == config.gateway || ip == config.dns;
        host != 0 && host != hosts && !is_taken && !self.leases.values().any(|taken| *taken == ip)
    }
}

fn reply_to<'a>(
    request: &DhcpRepr<'a>,
    config: &UserNetConfig,
    kind: DhcpMessageType,
    address: Ipv4Addr,
) -> DhcpRepr<'a> {
    let is_nak = kind == DhcpMessageType::Nak;
    let is_lease = !is_nak && !address.is_unspecified();
    let mask = u32::MAX << (32 - u32::from(config.prefix));
    DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if is_nak { Ipv4Addr::UNSPECIFIED } else { request.client_ip },
        your_ip: if is_nak { Ipv4Addr::UNSPECIFIED } else { address },
        server_ip: config.gateway,
        router: (!is_nak).then_some(config.gateway),
        subnet_mask: (!is_nak).then_some(Ipv4Addr::from_bits(mask)),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(config.gateway),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: is_lease.then_some(LEASE_SECONDS),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    }
}

/// Always broadcast: the client may have no address yet, and it is the only one on the link.
fn send((config, mtu): (&UserNetConfig, u16), reply: &DhcpRepr<'_>, outbox: &mut Outbox) {
    let mut payload = vec![0; reply.buffer_len()];
    if reply.emit(&mut DhcpPacket::new_unchecked(&mut payload[..])).is_err() {
        return;
    }
    let (from, to) = ((config.gateway, DHCP_SERVER_PORT), (Ipv4Addr::BROADCAST, DHCP_CLIENT_PORT));
    for packet in udp(from, to, &payload, usize::from(mtu), 0) {
        let mut frame = outbox.frame(ETHERNET + packet.len());
        frame.bytes_mut()[ETHERNET..].copy_from_slice(&packet);
        let to = match reply.broadcast {
            true => EthernetAddress::BROADCAST,
            false => reply.client_hardware_address,
        };
        write_ethernet(frame.bytes_mut(), GATEWAY_MAC, to);
        outbox.push(frame);
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{EthernetFrame, Ipv4Packet, UdpPacket};

    use super::*;

    const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    fn request(kind: DhcpMessageType, mac: EthernetAddress) -> DhcpRepr<'static> {
        let config = UserNetConfig::default();
        let mut repr = reply_to(&blank(mac), &config, kind, Ipv4Addr::UNSPECIFIED);
        (repr.server_identifier, repr.router, repr.subnet_mask) = (None, None, None);
        repr
    }

    fn blank(mac: EthernetAddress) -> DhcpRepr<'static> {
        DhcpRepr {
            message_type: DhcpMessageType::Discover,
            transaction_id: 77,
            secs: 0,
            client_hardware_address: mac,
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: true,
            requested_ip: None,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        }
    }

    /// The kind of the answer, its address, and all its bytes.
    fn ask(
        dhcp: &mut Dhcp,
        config: &UserNetConfig,
        repr: &DhcpRepr<'_>,
    ) -> Option<(DhcpMessageType, Ipv4Addr, Vec<u8>)> {
        let mut payload = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut payload[..])).unwrap();
        let mut outbox = Outbox::default();
        dhcp.process((config, config.mtu), &payload, &mut outbox);
        let frame = outbox.front()?.bytes().to_vec();
        let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
        let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
        let datagram = UdpPacket::new_checked(packet.payload()).unwrap();
        let reply = DhcpPacket::new_checked(datagram.payload()).unwrap();
        let parsed = DhcpRepr::parse(&reply).unwrap();
        assert_eq!((parsed.transaction_id, parsed.server_identifier), (77, Some(config.gateway)));
        Some((parsed.message_type, parsed.your_ip, datagram.payload().to_vec()))
    }

    #[test]
    fn a_client_gets_the_configured_address_and_keeps_it() {
        let config = UserNetConfig { hostname: Some("box".into()), ..UserNetConfig::default() };
        let mut dhcp = Dhcp::default();
        let (kind, ip, bytes) =
            ask(&mut dhcp, &config, &request(DhcpMessageType::Discover, MAC)).unwrap();
        assert_eq!((kind, ip), (DhcpMessageType::Offer, config.guest));
        for option in [&b"\x1a\x02\xff\xf0"[..], b"\x0c\x03box", b"\x06\x04\x0a\x00\x02\x03"] {
            assert!(bytes.windows(option.len()).any(|part| part == option), "{option:?}");
        }
        let mut wanted = request(DhcpMessageType::Request, MAC);
        wanted.requested_ip = Some(config.guest);
        let (kind, ip, _) = ask(&mut dhcp, &config, &wanted).unwrap();
        assert_eq!((kind, ip), (DhcpMessageType::Ack, config.guest));
        wanted.requested_ip = Some(Ipv4Addr::new(10, 0, 2, 99));
        assert_eq!(ask(&mut dhcp, &config, &wanted).unwrap().0, DhcpMessageType::Nak);
    }

    #[test]
    fn clients_get_different_addresses_until_there_are_no_more() {
        let config = UserNetConfig {
            prefix: 29,
            guest: Ipv4Addr::new(10, 0, 2, 5),
            ..UserNetConfig::default()
        };
        let mut dhcp = Dhcp::default();
        let mut given = Vec::new();
        for n in 0..8 {
            let mac = EthernetAddress([2, 0, 0, 0, 1, n]);
            let answer = ask(&mut dhcp, &config, &request(DhcpMessageType::Discover, mac));
            given.extend(answer.map(|(_, ip, _)| ip.octets()[3]));
        }
        assert_eq!(given, [5, 6, 1, 4]);
    }

    #[test]
    fn a_request_to_another_server_is_not_answered() {
        let config = UserNetConfig::default();
        let mut other = request(DhcpMessageType::Request, MAC);
        other.server_identifier = Some(Ipv4Addr::new(10, 0, 2, 200));
        assert!(ask(&mut Dhcp::default(), &config, &other).is_none());
    }
}
