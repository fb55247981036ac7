//! What is not TCP: DHCP, DNS, UDP, echo requests.

use std::net::{Ipv4Addr, UdpSocket};
use std::thread;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::dhcpv4;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet,
};

use super::super::frame::{ETHERNET, ipv4};
use super::super::link::GATEWAY_MAC;
use super::super::{Forward, Protocol, UserNetConfig};
use super::guest::{Guest, MAC, open};

/// An IPv4 packet in a frame of the guest.
pub(super) fn framed(packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET + packet.len()];
    frame[ETHERNET..].copy_from_slice(packet);
    let mut header = EthernetFrame::new_unchecked(&mut frame[..]);
    header.set_src_addr(MAC);
    header.set_dst_addr(GATEWAY_MAC);
    header.set_ethertype(EthernetProtocol::Ipv4);
    frame
}

fn echo(to: Ipv4Addr) -> Vec<u8> {
    let repr = Icmpv4Repr::EchoRequest { ident: 1, seq_no: 2, data: b"data" };
    let mut payload = vec![0; repr.buffer_len()];
    let checks = ChecksumCapabilities::default();
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut payload[..]), &checks);
    framed(&ipv4(UserNetConfig::default().guest, to, IpProtocol::Icmp, &payload))
}

/// Type and code of the ICMP message in a frame.
pub(super) fn icmp(frame: &[u8]) -> (u8, u8) {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
    assert_eq!(packet.next_header(), IpProtocol::Icmp);
    let message = Icmpv4Packet::new_checked(packet.payload()).unwrap();
    assert!(message.verify_checksum());
    (message.msg_type().into(), message.msg_code())
}

/// A server that answers each datagram with `answer`.
fn server(answer: fn(&[u8]) -> Vec<u8>) -> std::net::SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((count, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&answer(&buffer[..count]), from).unwrap();
        }
    });
    address
}

#[test]
fn the_guest_gets_a_lease() {
    let mut guest = Guest::new(UserNetConfig::default());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    guest.until("a lease", |guest| {
        if let Some(dhcpv4::Event::Configured(config)) =
            guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
        {
            lease = Some((config.address, config.router, config.dns_servers.to_vec()));
        }
        lease.is_some()
    });
    let (address, router, dns) = lease.unwrap();
    let config = guest.net.config();
    assert_eq!((address.address(), address.prefix_len()), (config.guest, config.prefix));
    assert_eq!((router, dns), (Some(config.gateway), vec![config.dns]));
}

#[test]
fn the_gateway_answers_echo_requests_and_nobody_else_does() {
    let mut guest = Guest::new(UserNetConfig::default());
    for ours in [guest.net.config().gateway, guest.net.config().dns] {
        let answers = guest.answers(&echo(ours));
        assert_eq!(answers.iter().map(|frame| icmp(frame)).collect::<Vec<_>>(), [(0, 0)]);
    }
    let answers = guest.answers(&echo(Ipv4Addr::new(192, 0, 2, 1)));
    assert_eq!(answers.iter().map(|frame| icmp(frame)).collect::<Vec<_>>(), [(3, 0)]);
}

#[test]
fn another_protocol_is_unreachable() {
    let mut guest = Guest::new(UserNetConfig::default());
    let (from, to) = (guest.net.config().guest, Ipv4Addr::new(192, 0, 2, 1));
    let answers = guest.answers(&framed(&ipv4(from, to, IpProtocol::Unknown(132), &[0; 20])));
    assert_eq!(answers.iter().map(|frame| icmp(frame)).collect::<Vec<_>>(), [(3, 2)]);
}

#[test]
fn dns_queries_go_to_the_resolver_over_udp_and_tcp() {
    let resolver = server(|query| [query, b" answered"].concat());
    let listener = std::net::TcpListener::bind(resolver).unwrap();
    let mut guest =
        Guest::new(UserNetConfig { resolver: Some(resolver), ..UserNetConfig::default() });
    let dns = guest.net.config().dns;
    let handle = guest.bind(5000);
    guest.udp(handle).send_slice(b"query", (dns, 53)).unwrap();
    let (answer, from) = guest.receive(handle);
    assert_eq!(answer, b"query answered");
    assert_eq!((from.endpoint.addr, from.endpoint.port), (dns.into(), 53));
    guest.connected(dns, 53);
    listener.accept().unwrap();
}

#[test]
fn datagrams_of_any_length_come_back() {
    let echo = server(<[u8]>::to_vec);
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.bind(5000);
    for length in [0, 1, 1000, 1472] {
        let data: Vec<u8> = (0..length).map(|n: usize| n.to_le_bytes()[0]).collect();
        guest.udp(handle).send_slice(&data, (gateway, echo.port())).unwrap();
        assert_eq!(guest.receive(handle).0, data);
    }
    assert_eq!(guest.net.counts(), (0, 1));
}

#[test]
fn long_datagrams_are_fragments_both_ways() {
    let echo = server(<[u8]>::to_vec);
    let mut guest = Guest::new(UserNetConfig { mtu: 1500, ..open() });
    let config = guest.net.config().clone();
    let data: Vec<u8> = (0..20_000_usize).map(|n| (n / 7).to_le_bytes()[0]).collect();
    let (from, to) = ((config.guest, 5000), (config.gateway, echo.port()));
    let packets = super::super::frame::udp(from, to, &data, 1500, 9);
    let (last, others) = packets.split_last().unwrap();
    for packet in others {
        assert!(guest.answers(&framed(packet)).is_empty());
    }
    // The answer to the whole may come at once.
    guest.net.input(&framed(last), false);
    guest.is_listening = false;
    let mut reassembly = super::super::reassembly::Reassembly::default();
    let mut whole = None;
    guest.until("all fragments", |guest| {
        guest.net.poll(std::time::Instant::now());
        while let Some(frame) = guest.net.front() {
            assert!(frame.bytes().len() <= 1514);
            let part = frame.bytes()[ETHERNET..].to_vec();
            whole = whole.take().or(reassembly.input(&part, std::time::Instant::now()));
            guest.net.pop();
        }
        whole.is_some()
    });
    assert_eq!(&whole.unwrap()[28..], &data[..]);
}

#[test]
fn a_closed_port_is_unreachable() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    drop(socket);
    let mut guest = Guest::new(open());
    let config = guest.net.config().clone();
    let (from, to) = ((config.guest, 5000), (config.gateway, port));
    let packet = super::super::frame::udp(from, to, b"x", 1500, 9).remove(0);
    let mut answers = guest.answers(&framed(&packet));
    guest.is_listening = false;
    guest.until("the error", |guest| {
        guest.net.poll(std::time::Instant::now());
        while let Some(frame) = guest.net.front() {
            answers.push(frame.bytes().to_vec());
            guest.net.pop();
        }
        !answers.is_empty()
    });
    assert_eq!(icmp(&answers[0]), (3, 3));
}

#[test]
fn flows_are_limited_and_the_oldest_ends() {
    let echo = server(<[u8]>::to_vec);
    let mut guest = Guest::new(UserNetConfig { max_flows: 4, ..open() });
    let gateway = guest.net.config().gateway;
    for port in 5000..5010 {
        let handle = guest.bind(port);
        guest.udp(handle).send_slice(b"x", (gateway, echo.port())).unwrap();
        assert_eq!(guest.receive(handle).0, b"x");
        assert!(guest.net.counts().1 <= 4);
    }
}

#[test]
fn an_idle_flow_ends() {
    let echo = server(<[u8]>::to_vec);
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.bind(5000);
    guest.udp(handle).send_slice(b"x", (gateway, echo.port())).unwrap();
    guest.receive(handle);
    assert_eq!(guest.net.counts().1, 1);
    guest.net.poll(std::time::Instant::now() + std::time::Duration::from_secs(61));
    assert_eq!(guest.net.counts().1, 0);
}

#[test]
fn a_udp_port_of_the_host_leads_to_the_guest() {
    let host = "127.0.0.1:0".parse().unwrap();
    let forward = Forward { protocol: Protocol::Udp, host, guest_port: 7 };
    let mut guest = Guest::new(UserNetConfig { forwards: vec![forward], ..Default::default() });
    let address = guest.net.forwards()[0].host;
    let server = guest.bind(7);
    let clients = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut froms = Vec::new();
    for client in &clients {
        client.send_to(b"ping", address).unwrap();
        let (data, from) = guest.receive(server);
        assert_eq!(data, b"ping");
        froms.push(from.endpoint);
    }
    assert_ne!(froms[0], froms[1]);
    for (client, from) in clients.iter().zip(froms) {
        let answer = from.port.to_string();
        guest.udp(server).send_slice(answer.as_bytes(), from).unwrap();
        guest.until("sent", |guest| guest.udp(server).send_queue() == 0);
        guest.turn();
        let mut buffer = [0; 16];
        let (count, _) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], answer.as_bytes());
    }
}
