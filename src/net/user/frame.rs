//! An Ethernet frame on its way to the guest, and how its headers are written. No state is here.

use std::net::Ipv4Addr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket,
    UdpRepr,
};

/// The length of an Ethernet header.
pub(super) const ETHERNET: usize = EthernetFrame::<&[u8]>::header_len();
/// The length of an IPv4 header without options.
pub(super) const IPV4: usize = smoltcp::wire::IPV4_HEADER_LEN;
/// The longest IPv4 packet.
pub(super) const MAX_IP: usize = 65_535;

/// What a frame leaves to the guest, as a virtio-net header describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Where the part of the frame begins that the checksum covers, and the offset of the checksum
    /// in this part. The field contains the sum of the pseudo-header. None: nothing is missing.
    pub checksum: Option<(u16, u16)>,
    /// The payload of each segment, if this is a TCP segment over IPv4 that is too long for the
    /// link. Zero if it is not.
    pub segment_size: u16,
    /// The length of all headers of such a segment.
    pub header_length: u16,
}

/// A frame for the guest.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// A buffer, used again, which may be longer than the frame.
    pub(super) buffer: Vec<u8>,
    pub(super) length: usize,
    /// What is left to the guest.
    pub offload: Offload,
}

impl Frame {
    /// The bytes, from the Ethernet header on.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(..self.length).unwrap_or_default()
    }
}

/// Write the Ethernet header of an IPv4 packet.
pub(super) fn write_ethernet(frame: &mut [u8], from: EthernetAddress, to: EthernetAddress) {
    let mut header = EthernetFrame::new_unchecked(frame);
    header.set_src_addr(from);
    header.set_dst_addr(to);
    header.set_ethertype(EthernetProtocol::Ipv4);
}

/// An IPv4 packet with this payload.
pub(super) fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; IPV4 + payload.len()];
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
    bytes[IPV4..].copy_from_slice(payload);
    bytes
}

/// The end of a UDP datagram's way: an address and a port.
pub(super) type End = (Ipv4Addr, u16);

/// A UDP datagram in IPv4 packets that fit the MTU. Empty if it is too long for IPv4.
pub(super) fn udp(from: End, to: End, payload: &[u8], mtu: usize, ident: u16) -> Vec<Vec<u8>> {
    let repr = UdpRepr { src_port: from.1, dst_port: to.1 };
    let length = repr.header_len() + payload.len();
    if IPV4 + length > MAX_IP {
        return Vec::new();
    }
    let mut datagram = vec![0; length];
    repr.emit(
        &mut UdpPacket::new_unchecked(&mut datagram[..]),
        &from.0.into(),
        &to.0.into(),
        payload.len(),
        |buffer| buffer.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    fragments(from.0, to.0, &datagram, mtu, ident)
}

fn fragments(
    from: Ipv4Addr,
    to: Ipv4Addr,
    datagram: &[u8],
    mtu: usize,
    ident: u16,
) -> Vec<Vec<u8>> {
    if IPV4 + datagram.len() <= mtu {
        return vec![ipv4(from, to, IpProtocol::Udp, datagram)];
    }
    let room = (mtu.saturating_sub(IPV4) & !7).max(8);
    let mut packets = Vec::new();
    for (index, part) in datagram.chunks(room).enumerate() {
        let mut bytes = ipv4(from, to, IpProtocol::Udp, part);
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        let offset = index * room;
        packet.set_ident(ident);
        packet.set_dont_frag(false);
        packet.set_more_frags(offset + part.len() < datagram.len());
        packet.set_frag_offset(u16::try_from(offset).unwrap_or(u16::MAX));
        packet.fill_checksum();
        packets.push(bytes);
    }
    packets
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: End = (Ipv4Addr::new(10, 0, 2, 2), 53);
    const THERE: End = (Ipv4Addr::new(10, 0, 2, 15), 4000);

    #[test]
    fn a_datagram_that_fits_is_one_packet_with_right_checksums() {
        let packets = udp(HERE, THERE, b"hello", 1500, 1);
        assert_eq!(packets.len(), 1);
        let packet = Ipv4Packet::new_checked(&packets[0][..]).unwrap();
        assert!(packet.verify_checksum() && !packet.more_frags());
        let udp = UdpPacket::new_checked(packet.payload()).unwrap();
        assert!(udp.verify_checksum(&HERE.0.into(), &THERE.0.into()));
        assert_eq!(udp.payload(), b"hello");
    }

    #[test]
    fn a_long_datagram_is_fragments_that_join_again() {
        let payload: Vec<u8> = (0..5000_u16).map(|n| n.to_le_bytes()[0]).collect();
        let packets = udp(HERE, THERE, &payload, 1500, 7);
        let mut whole = Vec::new();
        for (index, bytes) in packets.iter().enumerate() {
            assert!(bytes.len() <= 1500);
            let packet = Ipv4Packet::new_checked(&bytes[..]).unwrap();
            assert!(packet.verify_checksum());
            assert_eq!(usize::from(packet.frag_offset()), whole.len());
            assert_eq!(packet.more_frags(), index + 1 < packets.len());
            whole.extend_from_slice(packet.payload());
        }
        let udp = UdpPacket::new_checked(&whole[..]).unwrap();
        assert!(udp.verify_checksum(&HERE.0.into(), &THERE.0.into()));
        assert_eq!(udp.payload(), payload);
    }

    #[test]
    fn a_datagram_too_long_for_ipv4_is_none() {
        assert!(udp(HERE, THERE, &vec![0; MAX_IP], 1500, 1).is_empty());
    }
}
