//! The socket device with a mock driver, and sockets behind it.
//! Covers src/config/vsock.rs, src/virtio/vsock_driver.rs.

#[cfg(test)]
mod tests {
    use super::super::device::VirtioDevice;
    use super::super::mock::{Buffer, readable, writable};
    use super::super::vsock::{EVENT, RX, STREAM, TX, Vsock};
    use super::super::vsock_driver::*;
    use crate::config::VsockConfig;
    use crate::devices::Device;
    use crate::vsock::{BUFFER, HEADER_SIZE, Header, op};
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    #[test]
    fn the_configuration_is_the_address() {
        let guest = Guest::new();
        let mut cid = [9; 8];
        guest.driver.config(0, &mut cid);
        assert_eq!(u64::from_le_bytes(cid), 3);
        let mut beyond = [9; 4];
        guest.driver.config(8, &mut beyond);
        guest.driver.write_config(0, &[1; 8]);
        assert_eq!((beyond, guest.device.cid()), ([0; 4], 3));
        assert_eq!(guest.driver.offered() & 0xff_ffff, STREAM);
        assert!(Vsock::new(&VsockConfig { cid: 2, uds_path: None }).is_err());
    }

    #[test]
    fn data_is_spread_over_several_descriptors_both_ways() {
        let mut guest = Guest::new();
        let (ports, mut end) = guest.connected(52);
        end.write_all(&[7; 10_000]).unwrap();
        guest.turn();
        let data: Vec<u8> = guest.received.drain(..).flat_map(|(_, data)| data).collect();
        assert_eq!(data, [7; 10_000]);
        guest.send(Guest::packet(ports, op::RW), &[8; 3000]);
        let mut found = [0; 3000];
        end.read_exact(&mut found).unwrap();
        assert_eq!(found, [8; 3000]);
        assert_eq!(guest.device.connections(), 1);
    }

    #[test]
    fn the_loop_rests_where_the_guest_has_no_buffers_or_no_credit() {
        let mut guest = Guest::with(&VsockConfig::default(), 2);
        let (ports, mut end) = guest.connected(52);
        // All buffers are taken, and none is posted again.
        let posted = std::mem::take(&mut guest.posted);
        end.write_all(&[1; 100_000]).unwrap();
        for _ in 0..10 {
            guest.driver.turn(0).unwrap();
        }
        assert_eq!(guest.driver.turn(0).unwrap(), 0, "it rests");
        guest.posted = posted;
        guest.turn();
        let all =
            |guest: &mut Guest| guest.received.drain(..).map(|(_, data)| data.len()).sum::<usize>();
        assert_eq!(all(&mut guest), 100_000);
        // No credit.
        guest.send(Header { buf_alloc: 0, ..Guest::packet(ports, op::CREDIT_UPDATE) }, &[]);
        end.write_all(&[1; 100]).unwrap();
        guest.turn();
        assert_eq!(guest.ops(), [op::CREDIT_REQUEST]);
        assert_eq!(guest.driver.turn(0).unwrap(), 0, "it rests");
        drop(end);
        guest.turn();
        assert_eq!(guest.ops(), [op::SHUTDOWN], "nobody takes data any more");
        assert_eq!(guest.driver.turn(0).unwrap(), 0, "it rests");
        let update = Header { fwd_cnt: 100_000, ..Guest::packet(ports, op::CREDIT_UPDATE) };
        guest.send(update, &[]);
        assert_eq!(guest.ops(), [op::RW, op::SHUTDOWN]);
    }

    #[test]
    fn a_slow_reader_gets_everything_and_the_loop_rests_meanwhile() {
        let mut guest = Guest::new();
        let (ports, mut end) = guest.connected(52);
        let (mut sent, mut told) = (0u32, 0);
        while sent - told <= BUFFER - 4000 {
            guest.send(Guest::packet(ports, op::RW), &[5; 4000]);
            sent += 4000;
            told = guest
                .received
                .drain(..)
                .map(|(header, _)| header.fwd_cnt)
                .next_back()
                .unwrap_or(told);
        }
        assert_eq!(guest.turn(), 0, "it rests");
        let mut found = vec![0; usize::try_from(sent).unwrap()];
        let (mut done, step) = (0, 9000);
        while done < found.len() {
            let until = found.len().min(done + step);
            end.read_exact(&mut found[done..until]).unwrap();
            done = until;
            guest.turn();
        }
        assert!(found.iter().all(|byte| *byte == 5));
        assert!(guest.received.iter().any(|(header, _)| header.op == op::CREDIT_UPDATE));
    }

    #[test]
    fn many_connections_share_the_device() {
        let mut guest = Guest::new();
        let mut all: Vec<_> = (0..100).map(|port| guest.connected(port)).collect();
        all.iter_mut().for_each(|(_, end)| end.write_all(b"ping").unwrap());
        guest.turn();
        assert_eq!(guest.received.drain(..).filter(|(_, data)| data == b"ping").count(), 100);
        all.clear();
        guest.turn();
        let ends: Vec<_> = guest.received.drain(..).collect();
        assert_eq!(ends.len(), 100);
        for (header, _) in ends {
            assert_eq!((header.op, header.flags), (op::SHUTDOWN, 3));
            guest.send(Guest::packet((header.src_port, header.dst_port), op::RST), &[]);
        }
        assert_eq!(guest.device.connections(), 0);
    }

    #[test]
    fn refusals_hold_up_the_driver_and_not_the_loop() {
        let mut guest = Guest::with(&VsockConfig::default(), 0);
        for _ in 0..10 {
            let bytes: [u8; HEADER_SIZE] = Guest::packet((1, 1), op::REQUEST).into();
            guest.driver.memory.write(SENT, &bytes).unwrap();
            while guest.driver.add(TX, &[readable(SENT, 44)]).is_some() {}
            guest.driver.notify(1);
            guest.turn();
        }
        assert_eq!(guest.driver.turn(0).unwrap(), 0, "it rests");
        (0..64).for_each(|slot| guest.post(AT + slot * SLOT));
        guest.driver.notify(0);
        guest.turn();
        // The refusals of what was taken: one queue's worth, and those that were held up.
        assert!(guest.received.len() >= 512);
        assert!(guest.received.iter().all(|(header, _)| header.op == op::RST));
    }

    fn fails(guest: &mut Guest, reason: &str) {
        guest.turn();
        assert_eq!(guest.driver.read(super::super::registers::STATUS) & 0x40, 0x40);
        let failure = guest.driver.attached.transport.queues().failure().unwrap();
        assert!(failure.contains(reason), "{failure}");
        guest.posted.clear();
        assert_eq!(guest.driver.start(STREAM), 15);
        guest.post(AT);
        guest.driver.notify(0);
        let _end = guest.device.connect(52).unwrap();
        guest.turn();
        assert_eq!(guest.ops(), [op::REQUEST], "it works after a reset");
    }

    #[test]
    fn chains_without_room_for_a_header_need_a_reset() {
        for chain in [vec![readable(SENT, 43)], vec![readable(SENT, 0)], vec![writable(SENT, 44)]] {
            let mut guest = Guest::new();
            guest.driver.add(TX, &chain).unwrap();
            guest.driver.notify(1);
            fails(&mut guest, "shorter than its header");
        }
        for chain in [[writable(AT, 44)], [writable(AT, 3)], [readable(AT, 4096)]] {
            let mut guest = Guest::with(&VsockConfig::default(), 0);
            guest.driver.add(RX, &chain).unwrap();
            let _end = guest.device.connect(52).unwrap();
            fails(&mut guest, "not larger than a header");
        }
    }

    #[test]
    fn a_packet_shorter_than_it_says_resets_its_connection() {
        let mut guest = Guest::new();
        let (ports, _end) = guest.connected(52);
        for len in [5, u32::MAX] {
            let bytes: [u8; HEADER_SIZE] = Header { len, ..Guest::packet(ports, op::RW) }.into();
            guest.driver.memory.write(SENT, &bytes).unwrap();
            guest.driver.exchange(1, &[readable(SENT, 48)]).unwrap();
            guest.turn();
            assert_eq!(guest.ops(), [op::RST]);
        }
    }

    #[test]
    fn a_reset_by_the_driver_ends_the_connections() {
        let mut guest = Guest::new();
        let (_, mut end) = guest.connected(52);
        guest.driver.write(super::super::registers::STATUS, 0);
        assert_eq!(end.read(&mut [0]).unwrap(), 0, "also before the loop has run");
        assert!(guest.device.connect(52).is_err());
        guest.driver.turn(0).unwrap();
        assert_eq!(guest.device.connections(), 0);
        guest.posted.clear();
        assert_eq!(guest.driver.start(STREAM), 15);
        guest.post(AT);
        guest.driver.notify(0);
        guest.turn();
        guest.connected(52);
    }

    #[test]
    fn a_quiesced_device_does_nothing_and_catches_up() {
        let mut guest = Guest::new();
        let (ports, mut end) = guest.connected(52);
        let transport = Arc::clone(&guest.driver.attached.transport);
        Device::quiesce(&*transport).unwrap();
        end.write_all(b"meanwhile").unwrap();
        let _other = guest.device.connect(53).unwrap();
        guest.turn();
        assert!(guest.received.is_empty());
        Device::resume(&*transport);
        guest.turn();
        assert_eq!(guest.received.len(), 2);
        guest.send(Guest::packet(ports, op::RW), b"x");
        end.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn a_restored_driver_is_told_that_its_connections_are_gone() {
        let mut guest = Guest::new();
        let (_, mut end) = guest.connected(52);
        let transport = Arc::clone(&guest.driver.attached.transport);
        Device::quiesce(&*transport).unwrap();
        let state = Device::save(&*transport).unwrap();
        Device::resume(&*transport);
        end.write_all(b"still there").unwrap();
        guest.turn();
        assert_eq!(guest.received.pop_back().unwrap().1, b"still there");
        Device::quiesce(&*transport).unwrap();
        Device::restore(&*transport, &state).unwrap();
        Device::resume(&*transport);
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
        guest.turn();
        // The event waits for a buffer.
        guest.driver.memory.write(SENT, &[9; 8]).unwrap();
        assert_eq!(guest.driver.exchange(2, &[writable(SENT, 8)]), Some(4));
        let mut event = [0; 8];
        guest.driver.memory.read(SENT, &mut event).unwrap();
        assert_eq!(event, [0, 0, 0, 0, 9, 9, 9, 9]);
        guest.driver.add(EVENT, &[writable(SENT, 8)]).unwrap();
        guest.driver.notify(2);
        guest.turn();
        assert_eq!(guest.driver.used(EVENT), None, "told once");
        assert!(guest.device.restore(&[1]).is_err());
    }

    #[test]
    fn an_event_without_room_needs_a_reset() {
        let mut guest = Guest::new();
        guest.device.restore(&[]).unwrap();
        guest.driver.add(EVENT, &[writable(SENT, 3)]).unwrap();
        guest.driver.notify(2);
        guest.turn();
        let failure = guest.driver.attached.transport.queues().failure().unwrap();
        assert!(failure.contains("shorter than an event"), "{failure}");
    }

    #[test]
    fn a_device_like_it_has_its_address_and_no_path() {
        let folder = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = folder.as_path().join("v");
        let config = VsockConfig { cid: 7, uds_path: Some(path.clone()) };
        let guest = Guest::with(&config, 1);
        assert_eq!(Vsock::from_spec(&guest.device.spec()).unwrap().cid(), 7);
        assert!(Vsock::from_spec(&[1]).is_err());
        assert!(path.exists());
        guest.device.close();
        assert!(!path.exists());
    }

    #[test]
    fn programs_connect_by_the_unix_socket() {
        let folder = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = folder.as_path().join("v");
        let config = VsockConfig { cid: 3, uds_path: Some(path.clone()) };
        let mut guest = Guest::with(&config, 64);
        let mut program = UnixStream::connect(&path).unwrap();
        guest.turn();
        program.write_all(b"CONNECT 52\nhello").unwrap();
        guest.turn();
        let (request, _) = guest.received.pop_front().unwrap();
        guest.send(Guest::packet((request.src_port, 52), op::RESPONSE), &[]);
        let mut answer = [0; 14];
        program.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK 1073741824\n");
        assert_eq!(guest.received.pop_front().unwrap().1, b"hello");
        let refused = UnixStream::connect(&path).unwrap();
        drop(refused);
        guest.turn();
        assert_eq!((guest.device.connections(), guest.turn()), (1, 0));
        guest.driver.write(super::super::registers::STATUS, 0);
        guest.turn();
        let mut late = UnixStream::connect(&path).unwrap();
        late.write_all(b"CONNECT 52\n").unwrap();
        guest.turn();
        assert_eq!(late.read(&mut [0]).unwrap(), 0, "there is no driver");
    }

    // Long because both sides of both directions are in one place.
    #[test]
    fn streams_of_64_mib_arrive_whole_both_ways() {
        const TOTAL: usize = 64 << 20;
        let mut guest = Guest::new();
        let (ports, end) = guest.connected(52);
        let byte = |at: usize| (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0];
        let (mut reader, mut writer) = (end.try_clone().unwrap(), end);
        let reads = std::thread::spawn(move || {
            let (mut done, mut buffer) = (0, vec![0; 1 << 16]);
            while done < TOTAL {
                let count = reader.read(&mut buffer).unwrap();
                assert!(buffer[..count].iter().zip(done..).all(|(found, at)| *found == byte(at)));
                done += count;
            }
        });
        let writes = std::thread::spawn(move || {
            for at in (0..TOTAL).step_by(1 << 16) {
                let bytes: Vec<u8> = (at..at + (1 << 16)).map(byte).collect();
                writer.write_all(&bytes).unwrap();
            }
            writer
        });
        let (mut received, mut sent, mut forwarded) = (0, 0, 0);
        // The device keeps what the reader has no room for yet.
        while received < TOTAL || sent < TOTAL || !reads.is_finished() {
            guest.driver.turn(if received < TOTAL { 100 } else { 1 }).unwrap();
            guest.turn();
            for (header, data) in guest.received.drain(..) {
                assert!(data.iter().zip(received..).all(|(found, at)| *found == byte(at)));
                received += data.len();
                forwarded = header.fwd_cnt;
            }
            let in_flight = u32::try_from(sent & 0xffff_ffff).unwrap().wrapping_sub(forwarded);
            let count = usize::try_from(BUFFER - in_flight).unwrap().min(60_000).min(TOTAL - sent);
            let fwd_cnt = u32::try_from(received).unwrap();
            let operation = if count > 0 { op::RW } else { op::CREDIT_UPDATE };
            let data: Vec<u8> = (sent..sent + count).map(byte).collect();
            guest.send(Header { fwd_cnt, ..Guest::packet(ports, operation) }, &data);
            sent += count;
        }
        reads.join().unwrap();
        drop(writes.join().unwrap());
    }

    proptest! {
        #[test]
        fn no_chains_make_it_panic_or_spin(
            chains in prop::collection::vec((0usize..3, prop::collection::vec((0u64..0x9000, 0u32..0x2000, any::<bool>()), 1..5)), 1..60),
            bytes in prop::collection::vec(any::<u8>(), 0x400),
        ) {
            let mut guest = Guest::with(&VsockConfig::default(), 8);
            let (ports, mut end) = guest.connected(52);
            end.write_all(&[1; 5000]).unwrap();
            for (place, at) in (0..16u64).zip((0..0x4000).step_by(0x400)) {
                let mut bytes = bytes.clone();
                let operation = u16::from(bytes[usize::try_from(place).unwrap()] % 9);
                let header: [u8; HEADER_SIZE] = Header { len: 9, ..Guest::packet(ports, operation) }.into();
                bytes[..HEADER_SIZE].copy_from_slice(&header);
                guest.driver.memory.write(SENT + at, &bytes).unwrap();
            }
            for (queue, buffers) in chains {
                let buffers: Vec<Buffer> = buffers.into_iter().map(|(at, length, is_writable)| {
                    Buffer { address: SENT + (at & !0x3f), length, is_writable }
                }).collect();
                guest.driver.add(queue, &buffers);
                guest.driver.notify(u32::try_from(queue).unwrap());
                let mut events = 0;
                while guest.driver.turn(0).unwrap() > 0 {
                    events += 1;
                    prop_assert!(events < 1000, "it spins");
                }
            }
        }
    }
}
