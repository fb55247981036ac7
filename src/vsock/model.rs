//! Random steps of both sides of connections: streams arrive whole, and nothing else breaks.

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    use vm_memory::VolatileSlice;

    use super::super::credit::BUFFER;
    use super::super::mux::{FIRST_PORT, MAX_CONNECTIONS};
    use super::super::packet::{HOST_CID, Header, STREAM, op};
    use super::super::testing::{CID, Guest, bytes_from, read_some, write_some};

    const ALL: usize = usize::MAX;

    /// What a model step does to one of the connections.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        HostWrites,
        HostReads,
        HostEndsWriting,
        HostCloses,
        GuestWrites,
        GuestConsumes,
        GuestShrinksItsBuffer,
        GuestEndsWriting,
        GuestEndsReading,
    }

    /// The host's side of a connection, and what both have seen.
    struct HostSide {
        ports: (u32, u32),
        end: Option<UnixStream>,
        has_ended: bool,
        written: u32,
        read: u32,
    }

    impl HostSide {
        fn step(&mut self, guest: &mut Guest, step: Step, count: u32) {
            let side = guest.sides.get_mut(&self.ports).unwrap();
            let is_gone = side.is_reset || side.ended == 3;
            match (step, &mut self.end) {
                (Step::HostWrites, Some(end)) if !self.has_ended => {
                    self.written += write_some(end, self.written, count);
                }
                (Step::HostReads, Some(end)) => self.read += read_some(end, self.read, count).0,
                (Step::HostEndsWriting, Some(end)) => {
                    self.has_ended = true;
                    let _ = end.shutdown(Shutdown::Write);
                }
                (Step::HostCloses, _) => self.end = None,
                _ if is_gone => {}
                (Step::GuestWrites, _) if side.ended & 2 == 0 && side.ended_by_host & 1 == 0 => {
                    guest.stream(self.ports, count);
                }
                (Step::GuestConsumes, _) => guest.consume(self.ports, count),
                (Step::GuestShrinksItsBuffer, _) => {
                    side.buffer = (side.received - side.consumed).max(count % 3000);
                    guest.send(self.ports, op::CREDIT_UPDATE);
                }
                (Step::GuestEndsWriting, _) => guest.shut_down(self.ports, 2),
                (Step::GuestEndsReading, _) => guest.shut_down(self.ports, 1),
                _ => {}
            }
        }

        /// Whether all that can still arrive has arrived.
        fn check(&mut self, guest: &Guest) {
            let side = &guest.sides[&self.ports];
            let guest_reads = side.ended & 1 == 0 && !side.is_reset;
            if self.end.is_some() && guest_reads {
                assert_eq!(side.received, self.written);
            }
            if self.end.is_some() {
                assert_eq!(self.read, side.sent, "what the guest was allowed to send arrives");
            }
        }
    }

    fn steps() -> impl Strategy<Value = Vec<(Step, usize, u32, usize)>> {
        let data = prop_oneof![
            4 => Just(Step::HostWrites),
            4 => Just(Step::HostReads),
            4 => Just(Step::GuestWrites),
            4 => Just(Step::GuestConsumes),
            1 => Just(Step::GuestShrinksItsBuffer),
        ];
        let step = prop_oneof![
            30 => data,
            1 => Just(Step::HostEndsWriting),
            1 => Just(Step::HostCloses),
            1 => Just(Step::GuestEndsWriting),
            1 => Just(Step::GuestEndsReading),
        ];
        prop::collection::vec((step, 0usize..3, 1u32..100_000, 0usize..20), 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn streams_arrive_whole_and_in_order_whatever_happens(
            steps in steps(), room in 1usize..9000, buffer in 1u32..100_000,
        ) {
            let mut guest = Guest::new();
            (guest.room, guest.buffer) = (room.max(4), buffer);
            let mut hosts: Vec<_> = (0..3).map(|port| {
                let (ports, end) = guest.connected(port);
                HostSide { ports, end: Some(end), has_ended: false, written: 0, read: 0 }
            }).collect();
            for (step, which, count, packets) in steps {
                hosts[which].step(&mut guest, step, count);
                guest.turn(packets);
                prop_assert!(guest.mux.connections.values().all(|c| c.backlog.bytes().len() <= BUFFER as usize));
            }
            for side in guest.sides.values_mut() {
                side.buffer = side.buffer.max(1 << 20);
            }
            for _ in 0..40 {
                for host in &mut hosts {
                    host.step(&mut guest, Step::GuestConsumes, u32::MAX);
                    host.step(&mut guest, Step::HostReads, 1 << 20);
                }
                guest.turn(ALL);
            }
            hosts.iter_mut().for_each(|host| host.check(&guest));
            for host in &mut hosts {
                host.step(&mut guest, Step::HostCloses, 0);
                guest.turn(ALL);
                host.step(&mut guest, Step::GuestConsumes, u32::MAX);
                guest.shut_down(host.ports, 3);
                guest.turn(ALL);
            }
            prop_assert_eq!(guest.mux.count(), 0);
        }

        #[test]
        fn no_packets_make_it_panic_or_grow(
            packets in prop::collection::vec((0u32..3, 0u32..3, 0u16..9, any::<u32>(), any::<u32>(), any::<u32>(), 0u32..300, 0usize..3), 1..200),
        ) {
            let mut guest = Guest::new();
            let _listener = guest.listen(0);
            let mut ends: Vec<_> = (1..3).map(|port| guest.mux.connect(port).unwrap()).collect();
            let mut room = [0; 64];
            for (host, port, operation, len, buf_alloc, fwd_cnt, size, taken) in packets {
                let mut data = bytes_from(0, size);
                let len = if len % 2 == 0 { size } else { len };
                let src_port = port;
                let dst_port = if host == 0 { 0 } else { FIRST_PORT + host - 1 };
                let flags = fwd_cnt % 4;
                let header = Header { src_cid: CID, dst_cid: HOST_CID, src_port, dst_port, len, kind: STREAM, op: operation, flags, buf_alloc, fwd_cnt };
                if !guest.mux.is_congested() {
                    guest.mux.take_from_guest(&header, &[VolatileSlice::from(&mut data[..])]);
                }
                for _ in 0..taken {
                    if guest.mux.give_to_guest(&[VolatileSlice::from(&mut room[..])]).is_none() {
                        prop_assert!(!guest.mux.has_packets());
                    }
                }
                prop_assert!(guest.mux.count() <= MAX_CONNECTIONS);
            }
            while guest.mux.give_to_guest(&[VolatileSlice::from(&mut room[..])]).is_some() {}
            prop_assert!(!guest.mux.has_packets());
            ends.clear();
        }
    }
}
