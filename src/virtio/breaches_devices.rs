//! Drivers of a disk, a console, a source of entropy, a balloon and a socket device that break what
//! virtio 1.2 requires of them, by its sections. docs/virtio.md, docs/disk.md and docs/vsock.md say
//! what the device does.

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::balloon::tests::balloon as started_balloon;
    use super::super::blk::tests::{driver as disk, request};
    use super::super::mock::tests::rng;
    use super::super::mock::{Buffer, MockDriver, readable, writable};
    use super::super::registers::STATUS;
    use super::super::vsock_driver::Guest;
    use super::super::{Balloon, Console};
    use crate::config::{ConsoleConfig, ConsolePort};
    use crate::devices::Device;
    use crate::disk::Contents;
    use crate::vsock::{Header, op};

    const AT: u64 = MockDriver::BUFFERS;
    const DATA: u64 = AT + 0x1000;
    // Requests of a disk.
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    const FLUSH: u32 = 4;
    const ID: u32 = 8;
    const DISCARD: u32 = 11;
    const WRITE_ZEROES: u32 = 13;
    const SECURE_ERASE: u32 = 14;
    const OK: u8 = 0;
    const FAILED: u8 = 1;
    const UNSUPPORTED: u8 = 2;

    fn turn(driver: &MockDriver) {
        while driver.turn(0).unwrap() > 0 {}
    }

    fn started(features: u64) -> MockDriver {
        let mut driver =
            disk(Contents::Bytes(vec![7; 1 << 20]), |config| config.serial = "abc".into());
        assert_eq!(driver.start(features), 15);
        driver
    }

    /// Ranges to discard or to zero, each a sector, a count, flags.
    fn segments(driver: &MockDriver, all: &[(u64, u32, u32)]) -> Buffer {
        let bytes: Vec<u8> = all
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        driver.memory.write(DATA, &bytes).unwrap();
        readable(DATA, u32::try_from(bytes.len()).unwrap())
    }

    fn byte(driver: &MockDriver, at: u64) -> u8 {
        driver.memory.load(at).unwrap()
    }

    /// 5.2.5.1
    #[test]
    fn the_cache_mode_is_set_only_with_its_feature() {
        let write_back = |driver: &MockDriver| {
            let mut value = [9];
            driver.config(32, &mut value);
            value[0]
        };
        let (flush, config_wce) = (1 << 9, 1 << 11);
        let driver = started(flush);
        driver.write_config(32, &[0]);
        assert_eq!(write_back(&driver), 1);
        let driver = started(flush | config_wce);
        // Accesses of another width than the field's.
        driver.write_config(32, &[0, 0]);
        driver.write_config(30, &[0; 4]);
        assert_eq!(write_back(&driver), 1);
        driver.write_config(32, &[0]);
        assert_eq!(write_back(&driver), 0);
        driver.write_config(0, &[0; 8]);
        let mut size = [0; 8];
        driver.config(0, &mut size);
        assert_eq!(u64::from_le_bytes(size), 2048, "the capacity is not written");
    }

    /// 5.2.6.1
    #[test]
    fn requests_beyond_the_disk_and_of_parts_of_sectors_fail() {
        let mut driver = started(0);
        for (sector, length) in
            [(2048, 512), (2047, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 511), (0, 513)]
        {
            assert_eq!(request(&mut driver, READ, sector, &[writable(DATA, length)]), FAILED);
            assert_eq!(request(&mut driver, WRITE, sector, &[readable(DATA, length)]), FAILED);
        }
        assert_eq!(request(&mut driver, READ, 2047, &[writable(DATA, 512)]), OK);
        assert_eq!(byte(&driver, DATA), 7);
    }

    /// 5.2.6.1
    #[test]
    fn a_disk_that_is_read_only_is_not_written() {
        let mut driver = disk(Contents::Bytes(vec![7; 1 << 20]), |config| config.read_only = true);
        driver.start(0);
        assert_eq!(request(&mut driver, WRITE, 0, &[readable(DATA, 512)]), FAILED);
        for kind in [DISCARD, WRITE_ZEROES] {
            let ranges = segments(&driver, &[(0, 1, 0)]);
            assert_ne!(request(&mut driver, kind, 0, &[ranges]), OK);
        }
        assert_eq!(request(&mut driver, READ, 0, &[writable(DATA, 512)]), OK);
        assert_eq!(byte(&driver, DATA), 7);
    }

    /// 5.2.6.1
    #[test]
    fn a_flush_has_no_sector_and_no_data() {
        let mut driver = started(1 << 9);
        assert_eq!(request(&mut driver, FLUSH, u64::MAX, &[readable(DATA, 100)]), OK);
    }

    /// 5.2.6.1
    #[test]
    fn a_serial_number_of_another_length_is_cut_off_or_followed_by_nothing() {
        let mut driver = started(0);
        for (length, is_whole) in [(2, false), (20, true), (100, true)] {
            driver.memory.fill(DATA, 100, 9).unwrap();
            assert_eq!(request(&mut driver, ID, 0, &[writable(DATA, length)]), OK);
            let expected = if is_whole { [b'c', 0, 9] } else { [9, 9, 9] };
            let found = [DATA + 2, DATA + 19, DATA + 20].map(|at| byte(&driver, at));
            assert_eq!((byte(&driver, DATA), found), (b'a', expected));
        }
    }

    /// 5.2.6.1
    #[test]
    fn ranges_that_are_not_allowed_fail() {
        let mut driver = started(0);
        for kind in [DISCARD, WRITE_ZEROES] {
            for length in [0, 15, 17] {
                assert_eq!(request(&mut driver, kind, 0, &[readable(DATA, length)]), FAILED);
            }
            for (ranges, expected) in [
                (vec![(0, 0, 0); 16], OK),
                (vec![(0, 0, 0); 17], FAILED),
                (vec![(0, (1 << 17) + 1, 0)], FAILED),
                (vec![(2047, 2, 0)], FAILED),
                (vec![(u64::MAX, 1, 0)], FAILED),
                (vec![(0, 1, 2)], UNSUPPORTED),
                (vec![(0, 1, 1)], if kind == DISCARD { UNSUPPORTED } else { OK }),
            ] {
                let data = segments(&driver, &ranges);
                assert_eq!(request(&mut driver, kind, 0, &[data]), expected, "{kind} {ranges:?}");
            }
        }
        // Requests that are not offered.
        for kind in [2, 10, SECURE_ERASE, 15, u32::MAX] {
            assert_eq!(request(&mut driver, kind, 0, &[readable(DATA, 16)]), UNSUPPORTED);
        }
    }

    fn console(features: u64) -> (Arc<Console>, MockDriver) {
        let port = |name: &str| ConsolePort { name: name.into(), path: None };
        let ports = vec![port("con"), port("other")];
        let console = Arc::new(Console::new(ConsoleConfig { ports, size: (80, 25) }).unwrap());
        let mut driver = MockDriver::new(Arc::clone(&console) as _, 4).unwrap();
        assert_eq!(driver.start(features), 15);
        (console, driver)
    }

    /// 5.3.6.1
    #[test]
    fn buffers_in_the_wrong_queue_of_a_console_are_given_back() {
        let (console, mut driver) = console(3);
        let host = console.connect("con").unwrap();
        turn(&driver);
        for queue in [1, 3] {
            assert_eq!(driver.exchange(queue, &[writable(DATA, 8)]), Some(0));
        }
        let mut host = std::os::unix::net::UnixStream::from(host);
        std::io::Write::write_all(&mut host, b"x").unwrap();
        assert_eq!(driver.exchange(0, &[readable(DATA, 8)]), Some(0));
        assert_eq!(driver.exchange(0, &[writable(DATA, 8)]), Some(1), "and nothing is lost");
    }

    /// 5.3.6.2.2
    #[test]
    fn a_console_whose_driver_does_not_answer_waits() {
        let message = |driver: &mut MockDriver, id: u32, event: u16, value: u16| {
            let bytes = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()];
            driver.memory.write(AT, &bytes.concat()).unwrap();
            assert_eq!(driver.exchange(3, &[readable(AT, 8)]), Some(0));
            turn(driver);
        };
        let (console, mut driver) = console(3);
        driver.add(2, &[writable(DATA, 64)]).unwrap();
        driver.notify(2);
        // No DEVICE_READY, then one that failed: no port. Ports and events that do not exist.
        turn(&driver);
        message(&mut driver, 0, 0, 0);
        message(&mut driver, 2, 3, 1);
        message(&mut driver, u32::MAX, 6, 1);
        message(&mut driver, 0, 99, 1);
        assert_eq!(driver.used(2), None);
        // No PORT_OPEN: the host's bytes wait.
        message(&mut driver, 0, 3, 1);
        assert!(driver.used(2).is_some());
        let host = console.connect("con").unwrap();
        let mut host = std::os::unix::net::UnixStream::from(host);
        std::io::Write::write_all(&mut host, b"x").unwrap();
        driver.add(0, &[writable(DATA, 8)]).unwrap();
        driver.notify(0);
        turn(&driver);
        assert_eq!(driver.used(0), None);
        message(&mut driver, 0, 6, 1);
        assert_eq!(driver.used(0).map(|(_, length)| length), Some(1));
    }

    /// 5.3.2 and 5.3.6.2.2: messages without MULTIPORT.
    #[test]
    fn a_console_without_ports_has_no_messages() {
        let (_console, mut driver) = console(1);
        driver.memory.write(AT, &[0, 0, 0, 0, 0, 0, 1, 0]).unwrap();
        assert_eq!(driver.exchange(3, &[readable(AT, 8)]), Some(0));
        driver.add(2, &[writable(DATA, 64)]).unwrap();
        driver.notify(2);
        turn(&driver);
        assert_eq!(driver.used(2), None);
        assert_eq!(driver.exchange(1, &[readable(AT, 8)]), Some(0));
    }

    /// 5.4.6.1
    #[test]
    fn entropy_is_not_read() {
        let mut driver = rng();
        driver.start(0);
        driver.memory.fill(AT, 8, 9).unwrap();
        assert_eq!(driver.exchange(0, &[readable(AT, 8)]), Some(0));
        assert_eq!(driver.exchange(0, &[readable(AT, 8), writable(DATA, 8)]), Some(8));
        assert_eq!(driver.memory.load::<u64>(AT).unwrap(), 0x0909_0909_0909_0909);
    }

    fn balloon() -> (Arc<Balloon>, MockDriver) {
        let (balloon, driver) = started_balloon(Some(Duration::from_secs(3600)));
        driver.memory.fill(0x20_0000, 0x4000, 7).unwrap();
        (balloon, driver)
    }

    /// 5.5.6.1
    #[test]
    fn a_balloon_takes_only_pages_that_there_are() {
        let (balloon, mut driver) = balloon();
        // Taken back before they were given, a page that is none, and a number that is cut off.
        driver
            .memory
            .write(AT, &[0x200u32, u32::MAX, 0x201].map(u32::to_le_bytes).concat())
            .unwrap();
        assert_eq!(driver.exchange(1, &[readable(AT, 12)]), Some(0));
        assert_eq!(driver.exchange(0, &[readable(AT, 11)]), Some(0));
        assert_eq!((byte(&driver, 0x20_0000), byte(&driver, 0x20_1000)), (0, 7));
        assert_eq!(driver.exchange(0, &[writable(AT, 12)]), Some(0));
        // It does not say how many it has given, or not in one access.
        driver.write_config(4, &[1, 0]);
        driver.write_config(0, &[9; 4]);
        assert_eq!(balloon.size(), (3, 0));
    }

    /// 5.5.6.3.1
    #[test]
    fn more_than_one_buffer_of_statistics_gives_the_former_back() {
        let (balloon, mut driver) = balloon();
        let one = [&4u16.to_le_bytes()[..], &5u64.to_le_bytes(), &[1; 9]].concat();
        driver.memory.write(AT, &one).unwrap();
        let first = driver.add(2, &[readable(AT, 19)]).unwrap();
        driver.notify(2);
        turn(&driver);
        assert_eq!(balloon.statistics(), [(4, 5)], "what is not whole is ignored");
        assert_eq!(driver.used(2), None);
        let _second = driver.add(2, &[writable(AT, 10)]).unwrap();
        driver.notify(2);
        turn(&driver);
        assert_eq!(driver.used(2), Some((first, 0)));
        assert_eq!((balloon.statistics(), driver.used(2)), (vec![], None));
    }

    /// 5.5.6.7.1
    #[test]
    fn parts_of_pages_and_what_is_not_for_the_device_stay() {
        let (_balloon, mut driver) = balloon();
        assert_eq!(driver.exchange(3, &[readable(0x20_0000, 0x1000)]), Some(0));
        assert_eq!(driver.exchange(3, &[writable(0x20_1001, 0x1fff)]), Some(0));
        let found = [0x20_0000, 0x20_1000, 0x20_1fff, 0x20_2000, 0x20_3000];
        assert_eq!(found.map(|at| byte(&driver, at)), [7, 7, 7, 0, 7]);
        assert_eq!(driver.read(STATUS), 15);
    }

    /// 5.5.2: queues of features that were not accepted.
    #[test]
    fn a_balloon_has_no_queue_without_its_feature() {
        let (balloon, mut driver) = balloon();
        driver.start(0);
        for queue in [2, 3] {
            driver.add(queue, &[readable(AT, 10), writable(0x20_0000, 0x1000)]).unwrap();
            driver.notify(u32::try_from(queue).unwrap());
            turn(&driver);
            assert_eq!((driver.used(queue), byte(&driver, 0x20_0000)), (None, 7));
        }
        assert_eq!(balloon.statistics(), []);
    }

    /// 5.10.4 and 5.10.6.4: the upper half of an address is zero.
    #[test]
    fn addresses_of_sockets_are_as_the_configuration_says() {
        let mut guest = Guest::new();
        guest.driver.write_config(0, &4u64.to_le_bytes());
        let mut cid = [0; 8];
        guest.driver.config(0, &mut cid);
        assert_eq!(u64::from_le_bytes(cid), 3);
        let packet = Guest::packet((99, 99), op::RW);
        guest.send(Header { src_cid: 3 | 1 << 32, ..packet }, &[]);
        assert!(guest.ops().is_empty(), "dropped");
        guest.send(Header { dst_cid: 2 | 1 << 32, ..packet }, &[]);
        assert_eq!(guest.ops(), [op::RST]);
    }

    /// 5.10.6.7
    #[test]
    fn a_connection_that_ended_in_a_snapshot_is_refused() {
        let mut guest = Guest::new();
        let (ports, _end) = guest.connected(52);
        let transport = Arc::clone(&guest.driver.attached.transport);
        Device::quiesce(&*transport).unwrap();
        let state = Device::save(&*transport).unwrap();
        Device::restore(&*transport, &state).unwrap();
        Device::resume(&*transport);
        guest.turn();
        guest.received.clear();
        guest.send(Guest::packet(ports, op::RW), &[1]);
        assert_eq!(guest.ops(), [op::RST]);
    }
}
