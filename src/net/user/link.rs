//! The Ethernet link: the hardware addresses of gateway and guests, and ARP.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Ipv4Packet,
};

use super::config::UserNetConfig;
use super::frame::{ETHERNET, Frame, write_ethernet};
use super::outbox::Outbox;
use super::rules::in_network;

/// The gateway's hardware address, locally administered, as QEMU's user network has it.
pub(super) const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 2]);
/// As many hosts are known on the link.
const MOST: usize = 64;

/// As many frames wait for the hardware address of their receiver.
const WAITING: usize = 8;

/// What is known of the link.
#[derive(Clone, Debug, Default)]
pub(super) struct Link {
    neighbours: HashMap<Ipv4Addr, EthernetAddress>,
    waiting: Vec<(Ipv4Addr, Frame)>,
}

impl Link {
    /// Learn that an address of the network is at this hardware address, and send what waits.
    pub(super) fn learn(
        &mut self,
        config: &UserNetConfig,
        ip: Ipv4Addr,
        mac: EthernetAddress,
        outbox: &mut Outbox,
    ) {
        let is_own = ip == config.gateway || ip == config.dns;
        if !mac.is_unicast() || is_own || !in_network(ip, config.gateway, config.prefix) {
            return;
        }
        if self.neighbours.get(&ip) == Some(&mac) {
            return;
        }
        if self.neighbours.len() >= MOST && !self.neighbours.contains_key(&ip) {
            // The guest has invented addresses: begin again.
            self.neighbours.clear();
        }
        self.neighbours.insert(ip, mac);
        for (_, mut frame) in self.waiting.extract_if(.., |(to, _)| *to == ip) {
            write_ethernet(frame.bytes_mut(), GATEWAY_MAC, mac);
            outbox.push(frame);
        }
    }

    /// What is known of the hosts on it.
    pub(super) fn known(&self) -> Self {
        Self { neighbours: self.neighbours.clone(), waiting: Vec::new() }
    }

    pub(super) fn clear(&mut self) {
        self.neighbours.clear();
        self.waiting.clear();
    }

    /// Put the Ethernet header on an IPv4 packet for `to`, and send it. If the receiver's hardware
    /// address is not known, it is asked for first.
    pub(super) fn transmit(
        &mut self,
        mut frame: Frame,
        config: &UserNetConfig,
        to: Ipv4Addr,
        outbox: &mut Outbox,
    ) {
        if let Some(mac) = self.neighbours.get(&to) {
            write_ethernet(frame.bytes_mut(), GATEWAY_MAC, *mac);
            return outbox.push(frame);
        }
        if self.waiting.len() < WAITING {
            self.waiting.push((to, frame));
        }
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: GATEWAY_MAC,
            source_protocol_addr: config.gateway,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: to,
        };
        send(&request, EthernetAddress::BROADCAST, outbox);
    }

    /// Send an IPv4 packet.
    pub(super) fn send(&mut self, config: &UserNetConfig, packet: &[u8], outbox: &mut Outbox) {
        let Ok(header) = Ipv4Packet::new_checked(packet) else { return };
        let mut frame = outbox.frame(ETHERNET + packet.len());
        frame.bytes_mut()[ETHERNET..].copy_from_slice(packet);
        self.transmit(frame, config, header.dst_addr(), outbox);
    }
}

/// Answer an ARP request for one of our addresses, and learn from it.
pub(super) fn arp(link: &mut Link, config: &UserNetConfig, payload: &[u8], outbox: &mut Outbox) {
    let Ok(packet) = ArpPacket::new_checked(payload) else { return };
    let Ok(ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = ArpRepr::parse(&packet)
    else {
        return;
    };
    link.learn(config, source_protocol_addr, source_hardware_addr, outbox);
    let is_own = target_protocol_addr == config.gateway || target_protocol_addr == config.dns;
    if operation != ArpOperation::Request || !is_own || !source_hardware_addr.is_unicast() {
        return;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: GATEWAY_MAC,
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    send(&reply, source_hardware_addr, outbox);
}

fn send(arp: &ArpRepr, to: EthernetAddress, outbox: &mut Outbox) {
    let mut frame = outbox.frame(ETHERNET + arp.buffer_len());
    let mut header = EthernetFrame::new_unchecked(frame.bytes_mut());
    header.set_src_addr(GATEWAY_MAC);
    header.set_dst_addr(to);
    header.set_ethertype(EthernetProtocol::Arp);
    arp.emit(&mut ArpPacket::new_unchecked(header.payload_mut()));
    outbox.push(frame);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    fn ask(link: &mut Link, outbox: &mut Outbox, target: Ipv4Addr) {
        let config = UserNetConfig::default();
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: MAC,
            source_protocol_addr: config.guest,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut payload = vec![0; request.buffer_len()];
        request.emit(&mut ArpPacket::new_unchecked(&mut payload[..]));
        arp(link, &config, &payload, outbox);
    }

    #[test]
    fn only_the_addresses_of_the_gateway_are_answered() {
        let (mut link, mut outbox) = (Link::default(), Outbox::default());
        let config = UserNetConfig::default();
        // A guest probes whether its own address is free.
        ask(&mut link, &mut outbox, config.guest);
        ask(&mut link, &mut outbox, Ipv4Addr::new(10, 0, 2, 77));
        assert!(outbox.is_empty());
        for ours in [config.gateway, config.dns] {
            ask(&mut link, &mut outbox, ours);
            let frame = outbox.front().unwrap().bytes().to_vec();
            outbox.pop();
            let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
            assert_eq!(frame.dst_addr(), MAC);
            let packet = ArpPacket::new_checked(frame.payload()).unwrap();
            assert_eq!(packet.operation(), ArpOperation::Reply);
            assert_eq!(packet.source_protocol_addr(), ours.octets());
        }
    }

    #[test]
    fn invented_addresses_do_not_fill_memory() {
        let config = UserNetConfig { prefix: 8, ..UserNetConfig::default() };
        let mut link = Link::default();
        let mut outbox = Outbox::default();
        for n in 0..10_000_u32 {
            link.learn(&config, Ipv4Addr::from_bits(0x0a01_0000 + n), MAC, &mut outbox);
        }
        assert!(link.neighbours.len() <= MOST);
    }

    #[test]
    fn an_unknown_neighbour_is_asked_for_and_then_gets_its_packet() {
        let (mut link, mut outbox) = (Link::default(), Outbox::default());
        let config = UserNetConfig::default();
        let udp = smoltcp::wire::IpProtocol::Udp;
        let packet = super::super::frame::ipv4(config.gateway, config.guest, udp, &[0; 8]);
        link.send(&config, &packet, &mut outbox);
        let frame = EthernetFrame::new_checked(outbox.front().unwrap().bytes()).unwrap();
        assert_eq!(frame.ethertype(), EthernetProtocol::Arp);
        assert!(frame.dst_addr().is_broadcast());
        outbox.pop();
        assert!(outbox.is_empty());
        link.learn(&config, config.guest, MAC, &mut outbox);
        let frame = EthernetFrame::new_checked(outbox.front().unwrap().bytes()).unwrap();
        assert_eq!((frame.dst_addr(), frame.payload()), (MAC, &packet[..]));
        for _ in 0..100 {
            link.send(&UserNetConfig::default(), &packet[..], &mut outbox);
        }
        assert!(link.waiting.is_empty());
    }
}
