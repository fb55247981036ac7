//! The network as a device sees it: budgets, room, questions, the end.

use std::net::TcpListener;
use std::os::fd::RawFd;

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame};

use super::super::{UserBackend, UserNetConfig};
use super::guest::MAC;
use crate::net::{Frame, NetBackend, Offloads};

fn request(config: &UserNetConfig) -> Vec<u8> {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: MAC,
        source_protocol_addr: config.guest,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: config.gateway,
    };
    let mut frame = vec![0; 14 + arp.buffer_len()];
    let mut header = EthernetFrame::new_unchecked(&mut frame[..]);
    header.set_src_addr(MAC);
    header.set_dst_addr(EthernetAddress::BROADCAST);
    header.set_ethertype(smoltcp::wire::EthernetProtocol::Arp);
    arp.emit(&mut ArpPacket::new_unchecked(header.payload_mut()));
    frame
}

fn is_readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, alive for the call.
    unsafe { libc::poll(&raw mut poll, 1, 1000) == 1 }
}

fn taken(backend: &UserBackend, budget: usize, room: usize) -> usize {
    let mut count = 0;
    backend.receive(budget, &mut |frame| {
        assert_eq!(frame.bytes.len(), 42);
        let has_room = count < room;
        count += usize::from(has_room);
        has_room
    });
    count
}

#[test]
fn frames_that_are_left_stay_and_the_descriptor_says_so() {
    let backend = UserBackend::new(UserNetConfig::default()).unwrap();
    let frame = request(&backend.config());
    assert!(backend.answers());
    assert_eq!(backend.send(&[Frame::complete(&frame); 10]), 10);
    assert_eq!(taken(&backend, 4, 100), 4);
    assert!(is_readable(backend.watched().receive));
    assert_eq!(taken(&backend, 100, 3), 3);
    assert_eq!(taken(&backend, 100, 100), 3);
    assert_eq!(taken(&backend, 100, 100), 0);
    assert_eq!(backend.dropped(), 0);
}

#[test]
fn a_closed_network_takes_frames_and_gives_none() {
    let host = "127.0.0.1:0".parse().unwrap();
    let protocol = super::super::Protocol::Tcp;
    let forward = super::super::Forward { protocol, host, guest_port: 1 };
    let config = UserNetConfig { forwards: vec![forward], ..UserNetConfig::default() };
    let backend = UserBackend::new(config).unwrap();
    let address = backend.forwards()[0].host;
    assert!(TcpListener::bind(address).is_err());
    let frame = request(&backend.config());
    backend.close();
    assert!(backend.failure().is_some());
    assert_eq!(backend.send(&[Frame::complete(&frame)]), 1);
    assert_eq!(taken(&backend, 100, 100), 0);
    TcpListener::bind(address).unwrap();
}

#[test]
fn a_fork_has_a_network_of_its_own_and_other_ports() {
    let host = "127.0.0.1:0".parse().unwrap();
    let protocol = super::super::Protocol::Udp;
    let forward = super::super::Forward { protocol, host, guest_port: 1 };
    let config = UserNetConfig { forwards: vec![forward], mtu: 9000, ..UserNetConfig::default() };
    let backend = UserBackend::new(config).unwrap();
    backend.guest_offloads(Offloads { checksum: true, tso4: true, ..Offloads::default() });
    let fork = backend.freeze().unwrap().backend().unwrap();
    assert_eq!((fork.mtu(), fork.describe()), (Some(9000), "user network 10.0.2.2/24".into()));
    let fork = fork.as_any().downcast::<UserBackend>().unwrap();
    assert_ne!(fork.forwards()[0].host, backend.forwards()[0].host);
    assert_eq!(fork.counts(), (0, 0));
}

#[test]
fn a_datagram_is_cut_to_the_mtu_that_the_guest_uses() {
    use std::net::UdpSocket;
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let config = UserNetConfig { host_loopback: true, mtu: 9000, ..UserNetConfig::default() };
    let to = (config.gateway, host.local_addr().unwrap().port());
    let packet = super::super::frame::udp((config.guest, 5000), to, b"x", 1500, 1).remove(0);
    let frame = super::relay::framed(&packet);
    let backend = UserBackend::new(config).unwrap();
    for (mtu, expected) in [(1500, 4), (65_520, 1), (2000, 3)] {
        backend.guest_mtu(mtu);
        backend.send(&[Frame::complete(&frame)]);
        let (_, from) = host.recv_from(&mut [0; 8]).unwrap();
        host.send_to(&[7; 5000], from).unwrap();
        let mut sizes = Vec::new();
        while sizes.len() < expected {
            assert!(is_readable(backend.watched().receive));
            backend.receive(100, &mut |frame| {
                sizes.push(frame.bytes.len());
                true
            });
        }
        assert!(sizes.iter().all(|size| *size <= 14 + usize::from(mtu)), "{sizes:?}");
        assert_eq!(sizes.len(), expected);
    }
}

#[test]
fn a_port_that_is_taken_is_an_error_that_names_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap();
    let protocol = super::super::Protocol::Tcp;
    let forward = super::super::Forward { protocol, host, guest_port: 1 };
    let config = UserNetConfig { forwards: vec![forward], ..UserNetConfig::default() };
    let error = UserBackend::new(config).unwrap_err().to_string();
    assert!(error.contains("forward[0]") && error.contains(&host.to_string()), "{error}");
}

#[test]
fn questions_make_their_descriptor_readable() {
    let config = UserNetConfig { ask: true, ..UserNetConfig::default() };
    let backend = UserBackend::new(config).unwrap();
    let from = (backend.config().guest, 5000);
    let to = (std::net::Ipv4Addr::new(192, 0, 2, 1), 9);
    let packet = super::super::frame::udp(from, to, b"x", 1500, 1).remove(0);
    let frame = super::relay::framed(&packet);
    backend.send(&[Frame::complete(&frame)]);
    assert!(is_readable(backend.asked()));
    let questions = backend.take_questions();
    assert_eq!((questions[0].address, questions[0].port), to);
    assert!(backend.take_questions().is_empty());
    backend.answer(questions[0].id, false);
    // The guest gets an error.
    assert!(is_readable(backend.watched().receive));
    let mut count = 0;
    backend.receive(10, &mut |_| {
        count += 1;
        true
    });
    assert_eq!(count, 1);
}
