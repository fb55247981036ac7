//! ICMP: echo replies of the gateway, and errors about what the guest has sent.

use std::net::Ipv4Addr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet};

use super::config::UserNetConfig;
use super::frame::{IPV4, ipv4};
use super::link::Link;
use super::outbox::Outbox;

/// Of the packet that an error is about, the header and this many bytes are quoted.
const QUOTED: usize = 8;

/// The longest quote of a packet, with IP options.
pub(super) fn quote(packet: &[u8]) -> &[u8] {
    let header = packet.first().map_or(IPV4, |byte| usize::from(byte & 15) * 4);
    packet.get(..header + QUOTED).unwrap_or(packet)
}

/// Answer an echo request. The gateway and the DNS server reply; nothing else is reached by ICMP.
pub(super) fn process(config: &UserNetConfig, link: &mut Link, bytes: &[u8], outbox: &mut Outbox) {
    let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
    let Ok(message) = Icmpv4Packet::new_checked(packet.payload()) else { return };
    let checks = ChecksumCapabilities::default();
    let Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data }) = Icmpv4Repr::parse(&message, &checks)
    else {
        return;
    };
    let (from, to) = (packet.src_addr(), packet.dst_addr());
    if to != config.gateway && to != config.dns {
        return unreachable(config, link, Icmpv4DstUnreachable::NetUnreachable, bytes, outbox);
    }
    let reply = Icmpv4Repr::EchoReply { ident, seq_no, data };
    let mut payload = vec![0; reply.buffer_len()];
    reply.emit(&mut Icmpv4Packet::new_unchecked(&mut payload[..]), &checks);
    link.send(config, &ipv4(to, from, IpProtocol::Icmp, &payload), outbox);
}

/// Tell the guest that a packet of its own, or the quote of one, has not arrived.
pub(super) fn unreachable(
    config: &UserNetConfig,
    link: &mut Link,
    reason: Icmpv4DstUnreachable,
    packet: &[u8],
    outbox: &mut Outbox,
) {
    let Some(source) = packet.get(12..16).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()) else {
        return;
    };
    let quoted = quote(packet);
    let mut payload = vec![0; 8 + quoted.len()];
    payload[8..].copy_from_slice(quoted);
    let mut message = Icmpv4Packet::new_unchecked(&mut payload[..]);
    message.set_msg_type(smoltcp::wire::Icmpv4Message::DstUnreachable);
    message.set_msg_code(reason.into());
    message.fill_checksum();
    let to = Ipv4Addr::from(source);
    link.send(config, &ipv4(config.gateway, to, IpProtocol::Icmp, &payload), outbox);
}
