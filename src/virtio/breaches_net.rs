//! Drivers of a network device that break what virtio 1.2 requires of them, by its sections.
//! docs/net.md says what the device does.

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::mock::{MockDriver, readable, writable};
    use super::super::net::Net;
    use super::super::net_features::*;
    use super::super::registers::{STATUS as DEVICE_STATUS, VERSION_1};
    use crate::net::FrameQueue;
    use crate::net::header::HEADER;

    const ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 7];
    const SEND: u64 = MockDriver::BUFFERS;
    const RECEIVE: u64 = SEND + 0x1_0000;

    fn machine(features: u64) -> (MockDriver, Arc<FrameQueue>) {
        let queue = FrameQueue::new(64).unwrap();
        let net = Arc::new(Net::over(Arc::clone(&queue) as _, ADDRESS, Some(1400)));
        let mut driver = MockDriver::new(net, 8).unwrap();
        assert_eq!(driver.start(features), 15);
        turn(&driver);
        (driver, queue)
    }

    fn turn(driver: &MockDriver) {
        while driver.turn(0).unwrap() > 0 {}
    }

    /// Send a frame behind a header, which the driver gets back. Returns what arrives.
    fn sent(features: u64, header: [u8; HEADER], frame: &[u8]) -> Vec<Vec<u8>> {
        let (mut driver, queue) = machine(features);
        driver.memory.write(SEND, &[&header[..], frame].concat()).unwrap();
        let length = u32::try_from(HEADER + frame.len()).unwrap();
        assert_eq!(driver.exchange(1, &[readable(SEND, length)]), Some(0));
        queue.take(99)
    }

    /// A TCP segment of this many bytes over IPv4.
    fn segment(payload: u16) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((40 + payload).to_be_bytes());
        frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        frame.extend(vec![7; usize::from(payload)]);
        frame
    }

    /// 2.2.1 and 5.1.3.1
    #[test]
    fn a_feature_without_what_it_requires_is_refused() {
        let (mut driver, _queue) = machine(0);
        for alone in [GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, CTRL_RX, CTRL_MAC_ADDR]
            .into_iter()
            .chain([GUEST_ECN | GUEST_CSUM, HOST_ECN | CSUM])
        {
            assert_eq!(driver.greet(VERSION_1 | alone), 3, "{alone:#x}");
            driver.write(DEVICE_STATUS, 15);
            assert_eq!(driver.read(DEVICE_STATUS), 3);
        }
        for together in [
            OFFERED,
            GUEST_TSO6 | GUEST_ECN | GUEST_CSUM,
            HOST_TSO4 | HOST_ECN | CSUM,
            CTRL_RX | CTRL_VQ,
        ] {
            assert_eq!(driver.greet(VERSION_1 | together), 11, "{together:#x}");
        }
    }

    /// 5.1.4.2
    #[test]
    fn the_configuration_is_not_written() {
        let (driver, _queue) = machine(OFFERED);
        let space = |driver: &MockDriver| {
            let mut bytes = [0; 24];
            driver.config(0, &mut bytes);
            bytes
        };
        let before = space(&driver);
        assert_eq!(before[..6], ADDRESS);
        for offset in 0..24 {
            driver.write_config(offset, &[0x55]);
        }
        assert_eq!(space(&driver), before);
    }

    /// 5.1.4.2
    #[test]
    fn a_frame_longer_than_the_mtu_is_passed_on() {
        assert_eq!(sent(MTU, [0; HEADER], &[1; 1500]), [[1; 1500]]);
    }

    /// 5.1.6.2.1
    #[test]
    fn fields_that_do_not_apply_are_ignored() {
        let frame = [1; 60];
        // DATA_VALID and RSC_INFO, unknown flags, a place of a checksum, a count of buffers.
        assert_eq!(
            sent(OFFERED, [0xfe, 0, 9, 9, 9, 9, 0xff, 0xff, 0xff, 0xff, 9, 9], &frame),
            [frame]
        );
    }

    /// 5.1.6.2.1
    #[test]
    fn offloads_that_were_not_accepted_are_done_all_the_same() {
        let checksum = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        let frames = sent(0, checksum, &segment(10));
        assert_eq!(frames.len(), 1);
        assert_ne!(frames[0][50..52], [0, 0]);
        let cut = [1, 1, 54, 0, 0, 2, 34, 0, 16, 0, 0, 0];
        let lengths: Vec<usize> = sent(0, cut, &segment(1000)).iter().map(Vec::len).collect();
        assert_eq!(lengths, [566, 542]);
    }

    /// 5.1.6.2.1
    #[test]
    fn segments_that_are_not_described_are_dropped() {
        let right = [1, 1, 54, 0, 0, 2, 34, 0, 16, 0, 0, 0];
        assert_eq!(sent(OFFERED, right, &segment(1000)).len(), 2);
        let with = |at: usize, value: u8| {
            let mut header = right;
            header[at] = value;
            sent(OFFERED, header, &segment(1000))
        };
        let none: [Vec<u8>; 0] = [];
        assert_eq!(with(0, 0), none, "without a checksum");
        assert_eq!(with(5, 0), none, "without a size");
        assert_eq!(with(1, 3), none, "UDP, which is not offered");
        assert_eq!(with(1, 5), none, "UDP in segments");
        assert_eq!(with(7, 0xff), none, "a checksum outside the frame");
        assert_eq!(with(8, 6), none, "a checksum in another place than TCP's");
        // The length of the headers is a hint.
        assert_eq!(with(2, 0xff).len(), 2);
        // The wrong version of IP.
        assert_eq!(with(1, 4), none);
    }

    /// 5.1.6.3.1
    #[test]
    fn buffers_shorter_than_a_header_are_filled_in_their_order() {
        let (mut driver, queue) = machine(MRG_RXBUF);
        for index in 0..20 {
            driver.add(0, &[writable(RECEIVE + 5 * index, 5)]).unwrap();
        }
        driver.notify(0);
        turn(&driver);
        assert!(queue.give(&[6; 60]));
        turn(&driver);
        let used: u32 = std::iter::from_fn(|| driver.used(0)).map(|(_, length)| length).sum();
        let mut bytes = [0; 72];
        driver.memory.read(RECEIVE, &mut bytes).unwrap();
        assert_eq!((used, &bytes[10..12], &bytes[12..]), (72, &[15, 0][..], &[6; 60][..]));
    }

    /// 2.7.13 and 5.1.6.3.1: buffers with no room at all, more than there are descriptors.
    #[test]
    fn buffers_without_room_do_not_add_up() {
        let (mut driver, queue) = machine(MRG_RXBUF);
        driver.set_descriptor(0, 0, (RECEIVE, 16, 0, 0));
        for count in 0..=256 {
            assert_eq!(driver.read(DEVICE_STATUS), 15, "{count}");
            driver.add_head(0, 0);
            driver.notify(0);
            // Once it is full, a frame waits already.
            let _ = queue.give(&[6; 60]);
            turn(&driver);
            assert_eq!(driver.used(0), None);
        }
        assert_eq!(driver.read(DEVICE_STATUS), 0x4f);
    }

    /// 5.1.6.5
    #[test]
    fn commands_of_features_that_were_not_accepted_fail() {
        let answer = |features: u64, command: &[u8]| {
            let (mut driver, _queue) = machine(features);
            driver.memory.write(SEND, command).unwrap();
            driver.memory.fill(SEND + 0x100, 1, 9).unwrap();
            let length = u32::try_from(command.len()).unwrap();
            let chain = [readable(SEND, length), writable(SEND + 0x100, 1)];
            assert_eq!(driver.exchange(2, &chain), Some(1));
            driver.memory.load::<u8>(SEND + 0x100).unwrap()
        };
        let offloads = [&[5, 0][..], &GUEST_CSUM.to_le_bytes()].concat();
        let commands: [(u64, &[u8]); 5] = [
            (CTRL_RX, &[0, 0, 0]),
            (CTRL_RX, &[0, 1, 1]),
            (CTRL_RX, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (CTRL_MAC_ADDR, &[1, 1, 2, 0, 0, 0, 0, 8]),
            (CTRL_GUEST_OFFLOADS, &offloads),
        ];
        for (feature, command) in commands {
            assert_eq!(answer(OFFERED, command), 0, "{command:?}");
            assert_eq!(answer(OFFERED & !feature, command), 1, "{command:?}");
            let none = OFFERED & !(CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR);
            assert_eq!(answer(none, command), 1, "{command:?}");
            assert_eq!(answer(OFFERED, &command[..command.len() - 1]), 1, "{command:?}");
        }
        // An offload that was not accepted, and commands that are not offered.
        assert_eq!(
            answer(OFFERED & !(GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN), &offloads),
            1
        );
        for command in [[0, 2, 1, 0], [2, 0, 1, 0], [3, 0, 0, 0], [4, 0, 1, 0], [6, 0, 0, 0]] {
            assert_eq!(answer(OFFERED, &command), 1);
        }
    }

    /// 5.1.6.5
    #[test]
    fn a_command_without_room_for_its_answer_is_given_back() {
        let (mut driver, queue) = machine(OFFERED);
        driver.memory.write(SEND, &[0, 0, 0]).unwrap();
        assert_eq!(driver.exchange(2, &[readable(SEND, 3)]), Some(0));
        driver.add(0, &[writable(RECEIVE, 100)]).unwrap();
        driver.notify(0);
        assert!(queue.give(&[6; 60]));
        turn(&driver);
        assert_eq!(driver.used(0), None, "it is carried out: the frame is not for the guest");
        assert_eq!(driver.exchange(2, &[writable(SEND, 1)]), Some(1));
    }
}
