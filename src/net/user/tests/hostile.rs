//! Frames of a hostile guest: no panic, and nothing grows without bound.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Instant;

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};

use super::super::frame::ipv4;
use super::super::{Offloads, UserNet, UserNetConfig};
use super::guest::{Guest, open};
use super::relay::framed;

#[derive(Clone, Debug)]
struct Segment {
    port: u16,
    control: TcpControl,
    sequence: i32,
    acknowledged: Option<i32>,
    window: u16,
    scale: Option<u8>,
    mss: Option<u16>,
    length: usize,
}

fn control() -> impl Strategy<Value = TcpControl> {
    prop_oneof![
        3 => Just(TcpControl::None),
        1 => Just(TcpControl::Psh),
        1 => Just(TcpControl::Fin),
        3 => Just(TcpControl::Syn),
        1 => Just(TcpControl::Rst),
    ]
}

/// Numbers near each other, near the ends, and anywhere.
fn number() -> impl Strategy<Value = i32> {
    prop_oneof![0..100_i32, 65_000..66_000_i32, Just(i32::MIN), Just(i32::MAX), any::<i32>()]
}

fn segment() -> impl Strategy<Value = Segment> {
    (
        1000..1003_u16,
        control(),
        number(),
        proptest::option::of(number()),
        any::<u16>(),
        proptest::option::of(0..20_u8),
        proptest::option::of(prop_oneof![Just(0), Just(1), Just(536), any::<u16>()]),
        prop_oneof![Just(0_usize), 0..2000_usize, Just(60_000)],
    )
        .prop_map(|(port, control, sequence, acknowledged, window, scale, mss, length)| {
            Segment { port, control, sequence, acknowledged, window, scale, mss, length }
        })
}

/// A segment as a frame. `offset` makes its acknowledgement one that may be right.
fn frame(segment: &Segment, port: u16, offset: i32) -> Vec<u8> {
    let config = UserNetConfig::default();
    let payload = vec![7; segment.length];
    let acknowledged = segment.acknowledged.map(|n| TcpSeqNumber(offset.wrapping_add(n)));
    let repr = TcpRepr {
        src_port: segment.port,
        dst_port: port,
        control: segment.control,
        seq_number: TcpSeqNumber(segment.sequence),
        ack_number: acknowledged,
        window_len: segment.window,
        window_scale: segment.scale,
        max_seg_size: segment.mss,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &payload,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    let (from, to) = (config.guest.into(), config.gateway.into());
    let checks = ChecksumCapabilities::default();
    repr.emit(&mut TcpPacket::new_unchecked(&mut bytes[..]), &from, &to, &checks);
    framed(&ipv4(config.guest, config.gateway, IpProtocol::Tcp, &bytes))
}

/// The sequence number of the last segment that the network has sent.
fn drain(net: &mut UserNet) -> Option<i32> {
    let mut found = None;
    while let Some(frame) = net.front() {
        if let Some(bytes) = frame.bytes().get(34..).filter(|_| frame.bytes()[12..14] == [8, 0]) {
            found = TcpPacket::new_checked(bytes).ok().map(|packet| packet.seq_number().0);
        }
        net.pop();
    }
    found
}

proptest! {
    #[test]
    fn any_frame_is_survived(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..50),
        is_partial in any::<bool>(),
    ) {
        let mut net = UserNet::new(open()).unwrap();
        for frame in frames {
            net.input(&frame, is_partial);
        }
        net.poll(Instant::now());
    }

    #[test]
    fn any_ip_packet_is_survived(
        packets in prop::collection::vec(
            (prop::sample::select(vec![1_u8, 2, 6, 17, 47, 255]), any::<u32>(),
             prop::collection::vec(any::<u8>(), 0..120)),
            1..50,
        ),
    ) {
        let mut net = UserNet::new(UserNetConfig { allow: Some(vec![]), ..open() }).unwrap();
        let from = net.config().guest;
        for (protocol, to, payload) in packets {
            let packet = ipv4(from, Ipv4Addr::from_bits(to), IpProtocol::from(protocol), &payload);
            net.input(&framed(&packet), true);
        }
        net.poll(Instant::now());
    }

    #[test]
    fn any_sequence_of_segments_is_survived(
        segments in prop::collection::vec(segment(), 1..60),
        segments_offload in any::<bool>(),
    ) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut net = UserNet::new(open()).unwrap();
        net.set_offloads(Offloads { checksum: segments_offload, segments: segments_offload }).unwrap();
        let mut offset = 0;
        for segment in &segments {
            net.input(&frame(segment, port, offset), true);
            net.poll(Instant::now());
            if let Some(sequence) = drain(&mut net) {
                offset = sequence;
            }
        }
        net.poll(Instant::now() + std::time::Duration::from_secs(100));
        net.reset();
        prop_assert_eq!(net.counts(), (0, 0));
    }

    #[test]
    fn any_dhcp_message_is_survived(
        payload in prop::collection::vec(any::<u8>(), 0..400),
        has_cookie in any::<bool>(),
    ) {
        let mut payload = payload;
        if has_cookie && payload.len() > 240 {
            payload[..3].copy_from_slice(&[1, 1, 6]);
            payload[236..240].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
        }
        let mut net = UserNet::new(open()).unwrap();
        let (from, to) = ((Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67));
        for packet in super::super::frame::udp(from, to, &payload, 1500, 1) {
            net.input(&framed(&packet), false);
        }
    }
}

#[test]
fn a_flood_of_syns_that_nobody_reads_the_answers_of_is_bounded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(UserNetConfig { max_connections: 16, ..open() });
    let syn = Segment {
        port: 0,
        control: TcpControl::Syn,
        sequence: 1,
        acknowledged: None,
        window: 1000,
        scale: None,
        mss: None,
        length: 0,
    };
    for port_of_guest in 1..20_000 {
        let frame = frame(&Segment { port: port_of_guest, ..syn.clone() }, port, 0);
        guest.net.input(&frame, false);
        guest.net.poll(Instant::now());
        assert!(guest.net.counts().0 <= 16);
    }
    assert!(guest.net.dropped() > 10_000);
    assert!(drain(&mut guest.net).is_some());
}
