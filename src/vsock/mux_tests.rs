//! Connections, against a guest that is a model.
//! Covers src/vsock/mux.rs, src/vsock/connection.rs, src/vsock/testing.rs.

#[cfg(test)]
mod tests {
    use super::super::credit::BUFFER;
    use super::super::hosts::UnixSocket;
    use super::super::mux::{FIRST_PORT, MAX_CONNECTIONS, MAX_REFUSALS, Mux, UNIX};
    use super::super::packet::{Header, op};
    use super::super::testing::{Guest, byte_at, read_some, write_some};
    use event_manager::EventSet;
    use std::io;
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use vm_memory::VolatileSlice;

    const ALL: usize = usize::MAX;

    fn ops(guest: &Guest) -> Vec<u16> {
        guest.packets.iter().map(|packet| packet.op).collect()
    }

    #[test]
    fn the_host_connects_and_data_goes_both_ways() {
        let mut guest = Guest::new();
        let (ports, mut end) = guest.connected(52);
        assert_eq!(ports, (FIRST_PORT, 52));
        assert_eq!(write_some(&mut end, 0, 9000), 9000);
        guest.turn(ALL);
        assert_eq!(guest.sides[&ports].received, 9000);
        assert_eq!(guest.stream(ports, 5000), 5000);
        assert_eq!(read_some(&mut end, 0, 6000), (5000, false));
        drop(end);
        guest.consume(ports, 9000);
        guest.turn(ALL);
        assert_eq!(guest.sides[&ports].ended_by_host, 3);
        assert_eq!((guest.mux.count(), guest.mux.has_packets()), (0, false));
        assert_eq!(*ops(&guest).last().unwrap(), op::SHUTDOWN);
    }

    #[test]
    fn the_guest_connects_to_a_listener_and_is_refused_where_none_is() {
        let mut guest = Guest::new();
        let listener = guest.listen(7);
        let ports = guest.connect(7, 1025);
        guest.turn(ALL);
        assert!(guest.sides[&ports].is_established);
        let (mut end, _) = listener.accept().unwrap();
        end.set_nonblocking(true).unwrap();
        guest.stream(ports, 100);
        assert_eq!(read_some(&mut end, 0, 200), (100, false));
        for gone in [8, 7] {
            guest.mux.unlisten(gone);
            let ports = guest.connect(gone, 1026);
            guest.turn(ALL);
            assert!(guest.sides[&ports].is_reset);
        }
        assert_eq!(guest.mux.count(), 1);
    }

    #[test]
    fn a_full_backlog_of_a_listener_refuses() {
        let mut guest = Guest::new();
        let listener = guest.listen(7);
        // SAFETY: no pointers.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 2) }, 0);
        let all: Vec<_> = (0..).take(MAX_CONNECTIONS).map(|n| guest.connect(7, n)).collect();
        guest.turn(ALL);
        let accepted = all.iter().filter(|ports| guest.sides[*ports].is_established).count();
        assert!((1..=3).contains(&accepted), "{accepted}");
        assert_eq!(guest.mux.count(), accepted);
    }

    #[test]
    fn a_refused_program_reads_the_end() {
        let mut guest = Guest::new();
        guest.refuses = true;
        let mut end = UnixStream::from(guest.mux.connect(52).unwrap());
        guest.turn(ALL);
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
        assert_eq!(guest.mux.count(), 0);
        guest.mux.reset();
        let refused = guest.mux.connect(52).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_guest_that_ignores_the_credit_is_reset() {
        let mut guest = Guest::new();
        let (ports, end) = guest.connected(52);
        while guest.stream(ports, 60_000) > 0 {
            guest.turn(ALL);
        }
        assert!(guest.sides[&ports].sent > BUFFER, "the socket took some as well");
        let held = guest.mux.connections.values().next().unwrap().backlog.bytes().len();
        assert_eq!(u32::try_from(held).unwrap(), BUFFER);
        guest.write(ports, &mut [1]);
        guest.turn(ALL);
        assert!(guest.sides[&ports].is_reset);
        // What came before still arrives.
        let (mut end, mut got) = (end, 0);
        loop {
            let (count, is_over) = read_some(&mut end, got, 100_000);
            got += count;
            guest.turn(ALL);
            if is_over {
                break;
            }
        }
        assert_eq!(got, guest.sides[&ports].sent - 1);
        assert_eq!(guest.mux.count(), 0);
    }

    #[test]
    fn the_host_waits_for_credit_and_asks_once() {
        let mut guest = Guest::new();
        guest.buffer = 100;
        let (ports, mut end) = guest.connected(52);
        write_some(&mut end, 0, 250);
        for expected in [100, 200, 250] {
            for _ in 0..3 {
                guest.turn(ALL);
            }
            assert_eq!(guest.sides[&ports].received, expected);
            guest.consume(ports, 100);
        }
        assert_eq!(guest.sides[&ports].was_asked, 2);
    }

    #[test]
    fn an_end_needs_no_credit() {
        let mut guest = Guest::new();
        guest.buffer = 100;
        let (ports, mut end) = guest.connected(52);
        write_some(&mut end, 0, 100);
        guest.turn(ALL);
        drop(end);
        guest.turn(ALL);
        assert_eq!(guest.sides[&ports].ended_by_host, 3);
    }

    #[test]
    fn each_direction_ends_by_itself() {
        let mut guest = Guest::new();
        let (ports, mut end) = guest.connected(52);
        end.shutdown(Shutdown::Write).unwrap();
        guest.turn(ALL);
        assert_eq!(guest.sides[&ports].ended_by_host, 2);
        guest.stream(ports, 10);
        guest.shut_down(ports, 2);
        assert_eq!(read_some(&mut end, 0, 20), (10, false));
        assert_eq!(read_some(&mut end, 10, 20), (0, true));
        drop(end);
        guest.turn(ALL);
        assert_eq!(guest.sides[&ports].ended_by_host, 3);
        assert_eq!(guest.mux.count(), 0);

        let (ports, mut end) = guest.connected(53);
        guest.shut_down(ports, 1);
        assert_eq!(end.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        guest.stream(ports, 10);
        assert_eq!(read_some(&mut end, 0, 20), (10, false));
        end.shutdown(Shutdown::Read).unwrap();
        guest.stream(ports, 10);
        guest.turn(ALL);
        assert_eq!(guest.sides[&ports].ended_by_host & 1, 1);
    }

    #[test]
    fn what_the_guest_sent_before_it_ended_arrives() {
        let mut guest = Guest::new();
        let (ports, mut end) = guest.connected(52);
        while guest.stream(ports, 60_000) > 0 {}
        guest.shut_down(ports, 3);
        guest.turn(ALL);
        assert!(guest.sides[&ports].is_reset, "the guest is free to use its port again");
        assert_eq!(guest.mux.count(), 1);
        let sent = guest.sides[&ports].sent;
        guest.sides.remove(&ports);
        let _other = guest.connected(52);
        let mut got = 0;
        loop {
            let (count, is_over) = read_some(&mut end, got, 100_000);
            got += count;
            guest.turn(ALL);
            if is_over {
                break;
            }
        }
        assert_eq!((got, guest.mux.count()), (sent, 1));
    }

    #[test]
    fn packets_that_make_no_sense_are_refused() {
        let mut guest = Guest::new();
        let (ports, _end) = guest.connected(52);
        for operation in (0..=9u16).filter(|known| ![op::REQUEST, op::RST].contains(known)) {
            guest.packets.clear();
            guest.send((99, 99), operation);
            guest.turn(ALL);
            assert_eq!(ops(&guest), [op::RST], "{operation}");
        }
        let cases = [
            Header { kind: 2, ..guest.header(ports, op::RW) },
            Header { dst_cid: 1, ..guest.header(ports, op::RW) },
        ];
        for header in cases {
            guest.packets.clear();
            let mut room = [0; 8];
            guest.mux.take_from_guest(&header, &[]);
            let reply = guest.mux.give_to_guest(&[VolatileSlice::from(&mut room[..])]).unwrap();
            assert_eq!(reply, header.refusal());
        }
        guest.mux.take_from_guest(&Header { src_cid: 9, ..guest.header((1, 1), op::RW) }, &[]);
        guest.send((99, 99), op::RST);
        assert!(!guest.mux.has_packets(), "no answer");
        assert_eq!(guest.mux.count(), 1);
    }

    #[test]
    fn a_wrong_packet_resets_its_connection() {
        for operation in [0, op::REQUEST, op::RESPONSE, 8, u16::MAX] {
            let mut guest = Guest::new();
            let (ports, mut end) = guest.connected(52);
            guest.send(ports, operation);
            guest.turn(ALL);
            assert!(guest.sides[&ports].is_reset, "{operation}");
            assert_eq!(read_some(&mut end, 0, 1), (0, true));
        }
        let mut guest = Guest::new();
        let (ports, _end) = guest.connected(52);
        // A packet that is shorter than it says.
        let header = Header { len: 5, ..guest.header(ports, op::RW) };
        guest.mux.take_from_guest(&header, &[]);
        guest.turn(ALL);
        assert!(guest.sides[&ports].is_reset);
        let (ports, _end) = guest.connected(53);
        guest.shut_down(ports, 2);
        guest.write(ports, &mut [1]);
        guest.turn(ALL);
        assert!(guest.sides[&ports].is_reset, "data after the end");
    }

    #[test]
    fn refusals_are_bounded() {
        let mut guest = Guest::new();
        let mut taken = 0;
        while !guest.mux.is_congested() {
            guest.send((99, 99), op::RW);
            taken += 1;
        }
        assert_eq!(taken, MAX_REFUSALS);
        guest.turn(1);
        assert!(!guest.mux.is_congested());
    }

    #[test]
    fn connections_are_limited_and_those_whose_host_is_gone_make_room() {
        let mut guest = Guest::new();
        let mut ends: Vec<_> =
            (0..MAX_CONNECTIONS).map(|_| guest.mux.connect(52).unwrap()).collect();
        assert_eq!(guest.mux.connect(52).unwrap_err().raw_os_error(), Some(libc::EMFILE));
        let _listener = guest.listen(7);
        let ports = guest.connect(7, 1);
        guest.refuses = true;
        guest.turn(1);
        assert!(guest.sides[&ports].is_reset);
        ends.pop();
        guest.turn(0);
        ends.push(guest.mux.connect(52).unwrap());
        assert_eq!(guest.mux.count(), MAX_CONNECTIONS);
        guest.turn(ALL);
        assert_eq!(guest.mux.count(), 0);
    }

    #[test]
    fn a_reset_ends_all_and_a_start_begins_anew() {
        let mut guest = Guest::new();
        let (_, mut end) = guest.connected(52);
        let listener = guest.listen(7);
        guest.mux.reset();
        assert_eq!(read_some(&mut end, 0, 1), (0, true));
        guest.sides.clear();
        guest.mux.start();
        let ports = guest.connect(7, 1025);
        guest.turn(ALL);
        assert!(guest.sides[&ports].is_established, "listeners stay");
        listener.accept().unwrap();
    }

    #[test]
    fn a_device_without_a_driver_refuses() {
        let mut mux = Mux::new(3, None);
        assert!(mux.connect(52).is_err());
        mux.start();
        assert!(mux.connect(52).is_ok());
        mux.close();
        assert_eq!((mux.count(), mux.has_packets()), (0, false));
        assert!(mux.connect(52).is_err());
    }

    #[test]
    fn the_unix_socket_connects_both_ways() {
        let folder = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = folder.as_path().join("v");
        let mut guest = Guest::new();
        guest.mux.hosts.unix = Some(UnixSocket::bind(&path).unwrap());
        let mut client = UnixStream::connect(&path).unwrap();
        guest.mux.process_event(UNIX, EventSet::IN);
        let id = *guest.mux.handshakes.keys().next().unwrap();
        client.write_all(b"CONNECT 5").unwrap();
        guest.mux.process_event(id, EventSet::IN);
        client.write_all(b"2\n").unwrap();
        client.write_all(&[byte_at(0), byte_at(1)]).unwrap();
        guest.mux.process_event(id, EventSet::IN);
        guest.turn(ALL);
        let mut answer = [0; 14];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK 1073741824\n");
        assert_eq!(guest.sides[&(FIRST_PORT, 52)].received, 2);
        for nonsense in [&b"HELLO\n"[..], b"CONNECT 1"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(nonsense).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            guest.mux.process_event(UNIX, EventSet::IN);
            let id = *guest.mux.handshakes.keys().next().unwrap();
            guest.mux.process_event(id, EventSet::IN | EventSet::READ_HANG_UP);
            guest.mux.retired.clear();
            assert_ne!(client.read(&mut [0]).unwrap_or(0), 1);
        }
        let beside = std::os::unix::net::UnixListener::bind(folder.as_path().join("v_9")).unwrap();
        let ports = guest.connect(9, 1025);
        guest.turn(ALL);
        assert!(guest.sides[&ports].is_established);
        beside.accept().unwrap();
        assert_eq!(guest.mux.count(), 2);
    }
}
