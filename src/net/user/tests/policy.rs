//! Denials, and questions to the program.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use smoltcp::socket::tcp::State;

use super::super::frame::udp;
use super::super::{Ports, Protocol, Question, Rule, UserNetConfig};
use super::guest::{Guest, open};
use super::relay::{framed, icmp};

fn asking() -> UserNetConfig {
    UserNetConfig { ask: true, ..open() }
}

#[test]
fn the_hosts_loopback_is_closed_by_default() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(UserNetConfig::default());
    let gateway = guest.net.config().gateway;
    let handle = guest.connect(gateway, port);
    guest.until("refused", |guest| guest.tcp(handle).state() == State::Closed);
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
}

#[test]
fn an_allow_list_opens_what_it_names() {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
    let network = UserNetConfig::default().gateway;
    let (first, last) = (ports[0], ports[0]);
    let rule = Rule { protocol: None, network, prefix: 32, ports: Ports { first, last } };
    let mut guest =
        Guest::new(UserNetConfig { allow: Some(vec![rule]), ..UserNetConfig::default() });
    guest.connected(network, ports[0]);
    let other = guest.connect(network, ports[1]);
    guest.until("refused", |guest| guest.tcp(other).state() == State::Closed);
}

#[test]
fn a_denied_datagram_is_answered_by_an_error() {
    let mut guest = Guest::new(UserNetConfig { allow: Some(Vec::new()), ..Default::default() });
    let from = (guest.net.config().guest, 5000);
    let packet = udp(from, (Ipv4Addr::new(192, 0, 2, 1), 9), b"x", 1500, 1).remove(0);
    let answers = guest.answers(&framed(&packet));
    assert_eq!(answers.iter().map(|frame| icmp(frame)).collect::<Vec<_>>(), [(3, 13)]);
    // Multicast is never answered.
    let packet = udp(from, (Ipv4Addr::new(224, 0, 0, 251), 5353), b"x", 1500, 1).remove(0);
    assert!(guest.answers(&framed(&packet)).is_empty());
}

#[test]
fn the_program_is_asked_once_a_connection_and_its_answer_counts() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(asking());
    let gateway = guest.net.config().gateway;
    for is_allowed in [true, false] {
        let handle = guest.connect(gateway, port);
        let mut questions = Vec::new();
        guest.until("a question", |guest| {
            questions.extend(guest.net.take_questions());
            !questions.is_empty()
        });
        let Question { id, protocol, address, port: asked } = questions[0];
        assert_eq!((protocol, address, asked), (Protocol::Tcp, gateway, port));
        assert_eq!(guest.tcp(handle).state(), State::SynSent);
        guest.net.answer(id, is_allowed);
        let expected = if is_allowed { State::Established } else { State::Closed };
        guest.until("the answer counts", |guest| guest.tcp(handle).state() == expected);
        assert!(guest.net.take_questions().is_empty());
        // Nothing happens if it is answered again.
        guest.net.answer(id, true);
    }
}

#[test]
fn datagrams_wait_for_the_answer() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::new(asking());
    let to = (guest.net.config().gateway, server.local_addr().unwrap().port());
    let from = (guest.net.config().guest, 5000);
    for n in 0..3_u8 {
        assert!(guest.answers(&framed(&udp(from, to, &[n], 1500, 1)[0])).is_empty());
    }
    let questions = guest.net.take_questions();
    assert_eq!(questions.len(), 1);
    guest.net.answer(questions[0].id, true);
    let mut buffer = [0; 8];
    for n in 0..3_u8 {
        assert_eq!(server.recv(&mut buffer).unwrap(), 1);
        assert_eq!(buffer[0], n);
    }
    // Another flow, denied.
    guest.answers(&framed(&udp((from.0, 5001), to, b"x", 1500, 1)[0]));
    let id = guest.net.take_questions()[0].id;
    guest.net.answer(id, false);
    assert_eq!(icmp(guest.net.front().unwrap().bytes()), (3, 13));
}

#[test]
fn questions_that_nobody_answers_are_bounded() {
    let mut guest = Guest::new(UserNetConfig { max_connections: 4096, ..asking() });
    let from = guest.net.config().guest;
    for port in 1..5000 {
        let packet = udp((from, port), (Ipv4Addr::new(192, 0, 2, 1), 9), b"x", 1500, 1).remove(0);
        guest.answers(&framed(&packet));
    }
    assert!(guest.net.take_questions().len() <= 256);
    assert!(guest.net.counts().1 <= 256);
}
