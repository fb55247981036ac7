//! TCP both ways: data, ends, refusals, slow readers and forwarded ports.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;

use super::super::{Forward, Offloads, Protocol, UserNet, UserNetConfig};
use super::guest::{Guest, open};

/// Less without optimization, which takes twenty times as long.
const MANY: usize = if cfg!(debug_assertions) { 4 << 20 } else { 64 << 20 };

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Byte `n` of the data of a test.
fn pattern(n: usize) -> u8 {
    (n.wrapping_mul(2_654_435_761) >> 11).to_le_bytes()[0]
}

fn chunk(from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(pattern).collect()
}

fn checksum(sum: &mut crc32fast::Hasher, data: &[u8]) {
    sum.update(data);
}

fn expected(length: usize) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    for from in (0..length).step_by(1 << 16) {
        sum.update(&chunk(from, (length - from).min(1 << 16)));
    }
    sum.finalize()
}

/// Send the pattern from the guest, end, and receive until the end. Returns length and checksum of
/// what came.
fn exchange(guest: &mut Guest, handle: SocketHandle, length: usize) -> (usize, u32) {
    let (mut sent, mut received, mut sum) = (0, 0, crc32fast::Hasher::new());
    let mut is_closed = false;
    guest.until("the exchange", |guest| {
        let socket = guest.tcp(handle);
        while sent < length && socket.can_send() {
            sent += socket.send_slice(&chunk(sent, (length - sent).min(1 << 14))).unwrap();
        }
        if sent == length && !std::mem::replace(&mut is_closed, true) {
            socket.close();
        }
        while socket.can_recv() {
            received += socket
                .recv(|data| {
                    checksum(&mut sum, data);
                    (data.len(), data.len())
                })
                .unwrap();
        }
        !socket.may_recv() && !socket.is_active() || socket.state() == State::TimeWait
    });
    (received, sum.finalize())
}

/// The host reads all, and sends as much at the same time.
fn peer(listener: TcpListener, length: usize) -> thread::JoinHandle<(usize, u32)> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut writer = stream.try_clone().unwrap();
        let writing = thread::spawn(move || {
            for from in (0..length).step_by(1 << 16) {
                writer.write_all(&chunk(from, (length - from).min(1 << 16))).unwrap();
            }
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let (mut total, mut sum, mut buffer) = (0, crc32fast::Hasher::new(), vec![0; 1 << 16]);
        loop {
            let count = stream.read(&mut buffer).unwrap();
            if count == 0 {
                break;
            }
            total += count;
            sum.update(&buffer[..count]);
        }
        writing.join().unwrap();
        (total, sum.finalize())
    })
}

fn both_ways(offloads: Offloads) -> usize {
    let (listener, port) = listen();
    let host = peer(listener, MANY);
    let mut guest = Guest::with_offloads(open(), offloads);
    let gateway = guest.net.config().gateway;
    let handle = guest.connected(gateway, port);
    let sum = expected(MANY);
    assert_eq!(exchange(&mut guest, handle, MANY), (MANY, sum));
    // The network keeps what the host has no room for yet.
    guest.until("the host has everything", |_| host.is_finished());
    assert_eq!(host.join().unwrap(), (MANY, sum));
    guest.until("no connection is left", |guest| guest.net.counts().0 == 0);
    guest.longest
}

#[test]
fn data_goes_both_ways_at_once() {
    assert!(both_ways(Offloads::default()) <= 1514);
}

#[test]
fn a_guest_that_cuts_segments_itself_gets_long_ones() {
    assert!(both_ways(Offloads { checksum: true, segments: true }) > 16_000);
}

#[test]
fn a_guest_that_computes_checksums_gets_them_unfinished() {
    assert!(both_ways(Offloads { checksum: true, segments: false }) <= 1514);
}

#[test]
fn a_refused_connection_is_reset() {
    let (listener, port) = listen();
    drop(listener);
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.connect(gateway, port);
    guest.until("refused", |guest| guest.tcp(handle).state() == State::Closed);
    assert_eq!(guest.net.counts().0, 0);
}

#[test]
fn the_guest_may_go_on_sending_after_the_hosts_end() {
    let (listener, port) = listen();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"bye").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.connected(gateway, port);
    guest.until("the host's end", |guest| guest.tcp(handle).state() == State::CloseWait);
    let mut text = [0; 3];
    guest.tcp(handle).recv_slice(&mut text).unwrap();
    assert_eq!(&text, b"bye");
    guest.tcp(handle).send_slice(b"still here").unwrap();
    guest.tcp(handle).close();
    guest.until("the end", |guest| guest.net.counts().0 == 0);
    assert_eq!(host.join().unwrap(), "still here");
}

#[test]
fn the_host_may_go_on_sending_after_the_guests_end() {
    let (listener, port) = listen();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(text.to_uppercase().as_bytes()).unwrap();
    });
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.connected(gateway, port);
    guest.tcp(handle).send_slice(b"hello").unwrap();
    guest.tcp(handle).close();
    guest.until("the answer", |guest| guest.tcp(handle).recv_queue() == 5);
    let mut text = [0; 5];
    guest.tcp(handle).recv_slice(&mut text).unwrap();
    assert_eq!(&text, b"HELLO");
    host.join().unwrap();
    guest.until("the end", |guest| guest.net.counts().0 == 0);
}

#[test]
fn a_reset_goes_through_both_ways() {
    let (listener, port) = listen();
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let first = guest.connected(gateway, port);
    let (mut stream, _) = listener.accept().unwrap();
    guest.tcp(first).abort();
    guest.until("the guest's reset", |guest| guest.net.counts().0 == 0);
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let second = guest.connected(gateway, port);
    let (stream, _) = listener.accept().unwrap();
    super::super::host::reset_when_closed(&stream);
    drop(stream);
    guest.until("the host's reset", |guest| guest.tcp(second).state() == State::Closed);
    assert_eq!(guest.net.counts().0, 0);
}

#[test]
fn a_reader_that_is_slow_holds_the_sender_up_and_loses_nothing() {
    let (listener, port) = listen();
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.connected(gateway, port);
    let (mut stream, _) = listener.accept().unwrap();
    // Until nothing moves any more: the host's buffers and ours are full.
    let mut sent = 0;
    let mut still = 0;
    guest.until("the sender is held up", |guest| {
        let socket = guest.tcp(handle);
        let before = sent;
        while socket.can_send() {
            sent += socket.send_slice(&chunk(sent, 1 << 14)).unwrap();
        }
        still = if sent == before { still + 1 } else { 0 };
        still > 200
    });
    assert!(sent < 64 << 20, "{sent} bytes are held somewhere");
    guest.tcp(handle).close();
    let reading = thread::spawn(move || {
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        data
    });
    guest.until("the end", |_| reading.is_finished());
    assert!(reading.join().unwrap() == chunk(0, sent));
}

#[test]
fn a_guest_that_takes_no_frames_holds_the_host_up() {
    let (listener, port) = listen();
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.connected(gateway, port);
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    guest.is_listening = false;
    let (mut sent, mut still) = (0, 0);
    guest.until("the host is held up", |_| {
        let before = sent;
        while let Ok(count) = (&stream).write(&chunk(sent, 1 << 14)) {
            sent += count;
        }
        still = if sent == before { still + 1 } else { 0 };
        still > 200
    });
    guest.is_listening = true;
    drop(stream);
    let (mut got, mut received) = (0, Vec::new());
    guest.until("all has come", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            got += socket
                .recv(|data| (data.len(), received.extend_from_slice(data)))
                .map_or(0, |()| 1);
        }
        received.len() >= sent
    });
    assert!(got > 0 && received == chunk(0, sent));
}

#[test]
fn connections_are_limited_and_a_place_is_free_again() {
    let (listener, port) = listen();
    let mut guest = Guest::new(UserNetConfig { max_connections: 2, ..open() });
    let gateway = guest.net.config().gateway;
    let first = guest.connected(gateway, port);
    guest.connected(gateway, port);
    let third = guest.connect(gateway, port);
    guest.until("refused", |guest| guest.tcp(third).state() == State::Closed);
    guest.tcp(first).abort();
    guest.until("a place is free", |guest| guest.net.counts().0 == 1);
    guest.connected(gateway, port);
    drop(listener);
}

#[test]
fn a_port_of_the_host_leads_to_the_guest() {
    let host = "127.0.0.1:0".parse().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, host, guest_port: 80 };
    let mut guest = Guest::new(UserNetConfig { forwards: vec![forward], ..Default::default() });
    let address = guest.net.forwards()[0].host;
    assert_ne!(address.port(), 0);
    let server = guest.new_tcp();
    guest.tcp(server).listen(80).unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"ping").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    guest.until("the request", |guest| guest.tcp(server).recv_queue() == 4);
    let remote = guest.tcp(server).remote_endpoint().unwrap();
    assert_eq!(remote.addr, guest.net.config().gateway.into());
    guest.tcp(server).send_slice(b"pong").unwrap();
    guest.tcp(server).close();
    guest.until("the answer", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), "pong");
    guest.until("the end", |guest| guest.net.counts().0 == 0);
}

#[test]
fn a_forwarded_port_that_the_guest_refuses_is_reset() {
    let host = "127.0.0.1:0".parse().unwrap();
    let forward = Forward { protocol: Protocol::Tcp, host, guest_port: 81 };
    let mut guest = Guest::new(UserNetConfig { forwards: vec![forward], ..Default::default() });
    let address = guest.net.forwards()[0].host;
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.read(&mut [0]).map_err(|e| e.kind())
    });
    guest.until("the reset", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), Err(std::io::ErrorKind::ConnectionReset));
}

#[test]
fn a_reset_of_the_device_ends_all_connections() {
    let (listener, port) = listen();
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.connected(gateway, port);
    let (mut stream, _) = listener.accept().unwrap();
    guest.net.reset();
    assert_eq!(guest.net.counts(), (0, 0));
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // The guest finds out when it uses it.
    guest.tcp(handle).send_slice(b"x").unwrap();
    guest.until("the reset", |guest| guest.tcp(handle).state() == State::Closed);
}

#[test]
fn a_fork_has_the_address_and_sees_its_connections_end() {
    let (listener, port) = listen();
    let mut guest = Guest::new(open());
    let gateway = guest.net.config().gateway;
    let handle = guest.connected(gateway, port);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"abc").unwrap();
    guest.until("the data", |guest| guest.tcp(handle).recv_queue() == 3);
    guest.turn();
    let continued = guest.net.continued();
    let original = std::mem::replace(&mut guest.net, UserNet::continuing(&continued).unwrap());
    guest.until("the reset", |guest| guest.tcp(handle).state() == State::Closed);
    // The original continues.
    assert_eq!(original.counts().0, 1);
    stream.write_all(b"d").unwrap();
}
