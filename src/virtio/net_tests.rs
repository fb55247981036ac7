//! The network device with a mock driver, and a program's queue or a socket behind it.
//! Covers src/virtio/net.rs, src/virtio/net_receive.rs, src/virtio/net_transmit.rs,
//! src/virtio/net_features.rs, src/config/net.rs.

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::sync::Arc;

    use super::super::mock::{Buffer, MockDriver, readable, writable};
    use super::super::net::Net;
    use super::super::net_features::*;
    use crate::net::header::{HEADER, encode};
    use crate::net::{
        Checksum, DatagramSocket, Frame, FrameQueue, NetBackend, Offload, Segmentation,
        StreamSocket,
    };

    const MAC_ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 7];
    /// Frames to send are here, and buffers to receive there.
    const SEND: u64 = MockDriver::BUFFERS;
    const RECEIVE: u64 = MockDriver::BUFFERS + (1 << 20);
    const STEP: u64 = 2048;

    struct Machine {
        driver: MockDriver,
        net: Arc<Net>,
        /// Receive buffers given so far.
        buffers: u64,
    }

    impl Machine {
        fn new(backend: Arc<dyn NetBackend>, features: u64) -> Self {
            let net = Arc::new(Net::over(backend, MAC_ADDRESS, Some(1400)));
            let mut driver = MockDriver::new(Arc::clone(&net) as _, 8).unwrap();
            assert_eq!(driver.start(features), 15);
            let machine = Self { driver, net, buffers: 0 };
            machine.turns();
            machine
        }

        /// Run the loop until it has nothing to do.
        fn turns(&self) {
            for _ in 0..1000 {
                if self.driver.turn(0).unwrap() == 0 {
                    return;
                }
            }
            panic!("the loop spins");
        }

        fn give_buffers(&mut self, count: u64, length: u32) {
            for _ in 0..count {
                let at = RECEIVE + self.buffers % 500 * STEP;
                self.driver.add(0, &[writable(at, length)]).unwrap();
                self.buffers += 1;
            }
            self.driver.notify(0);
            self.turns();
        }

        /// The frames that the guest has received, each with its header.
        fn received(&mut self) -> Vec<(Vec<u8>, Vec<u8>)> {
            let (mut frames, mut at) = (Vec::new(), 0);
            while let Some((_, length)) = self.driver.used(0) {
                let bytes = self.read(RECEIVE + at * STEP, length);
                at += 1;
                let (header, mut frame) = (bytes[..HEADER].to_vec(), bytes[HEADER..].to_vec());
                for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
                    let (_, length) = self.driver.used(0).unwrap();
                    frame.extend(self.read(RECEIVE + at * STEP, length));
                    at += 1;
                }
                frames.push((header, frame));
            }
            frames
        }

        fn read(&self, at: u64, length: u32) -> Vec<u8> {
            let mut bytes = vec![0; length.try_into().unwrap()];
            self.driver.memory.read(at, &mut bytes).unwrap();
            bytes
        }

        fn add(&mut self, offload: &Offload, frame: &[u8]) {
            let bytes = [&encode(offload, 0)[..], frame].concat();
            self.driver.memory.write(SEND, &bytes).unwrap();
            self.driver.add(1, &[readable(SEND, bytes.len().try_into().unwrap())]).unwrap();
        }

        fn send(&mut self, offload: &Offload, frame: &[u8]) {
            self.add(offload, frame);
            self.driver.notify(1);
            self.turns();
        }

        fn link_status(&self) -> u8 {
            let mut status = [9; 2];
            self.driver.config(6, &mut status);
            status[0]
        }
    }

    fn queue(features: u64) -> (Machine, Arc<FrameQueue>) {
        let queue = FrameQueue::new(64).unwrap();
        (Machine::new(Arc::clone(&queue) as _, features), queue)
    }

    /// A TCP segment over IPv4, with the sum of its pseudo-header in place of its checksum.
    fn segment(payload: usize) -> (Vec<u8>, Offload) {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0]);
        let length = u16::try_from(20 + payload).unwrap();
        frame.extend((length + 20).to_be_bytes());
        frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0]);
        frame.extend((0x1409_u16 + length).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend((0..payload).map(|n| u8::try_from(n % 251).unwrap()));
        let cut = Segmentation { is_v6: false, size: 1000, header_length: 54, has_ecn: false };
        let checksum = Some(Checksum { start: 34, offset: 16 });
        (frame, Offload { checksum, segmentation: Some(cut), is_verified: false })
    }

    #[test]
    fn the_configuration_has_address_link_and_mtu() {
        let (machine, _queue) = queue(0);
        assert_eq!(machine.driver.offered() & OFFERED, OFFERED);
        assert_ne!(machine.driver.offered() & MTU, 0);
        let mut config = [0xff; 14];
        machine.driver.config(0, &mut config);
        assert_eq!(config[..6], MAC_ADDRESS);
        assert_eq!(config[6..12], [1, 0, 1, 0, 0x78, 5]);
    }

    #[test]
    fn frames_go_both_ways() {
        let (mut machine, queue) = queue(MRG_RXBUF);
        machine.send(&Offload::NONE, &[5; 60]);
        assert_eq!(queue.take(9), [[5; 60]]);
        assert_eq!(machine.driver.used(1).map(|(_, length)| length), Some(0));
        machine.give_buffers(4, 1526);
        assert!(queue.give(&[6; 60]) && queue.give(&[7; 1514]));
        machine.turns();
        let received = machine.received();
        assert_eq!(received.len(), 2);
        assert_eq!(received[0].0, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!((&received[0].1[..], &received[1].1[..]), (&[6; 60][..], &[7; 1514][..]));
        let counts = machine.net.counts();
        assert_eq!((counts.sent, counts.received, counts.received_bytes), (1, 2, 1574));
    }

    #[test]
    fn a_long_frame_is_merged_of_several_buffers() {
        let (mut machine, queue) = queue(MRG_RXBUF);
        machine.give_buffers(2, 1000);
        let frame: Vec<u8> = (0..2500).map(|n| u8::try_from(n % 250).unwrap()).collect();
        assert!(queue.give(&frame));
        machine.turns();
        assert_eq!(machine.received(), [], "there is room for a part only");
        machine.give_buffers(1, 1000);
        let received = machine.received();
        assert_eq!(received.len(), 1);
        assert_eq!((received[0].0[10], &received[0].1), (3, &frame));
    }

    #[test]
    fn without_buffers_the_loop_rests_and_frames_wait() {
        let (mut machine, queue) = queue(0);
        for number in 0..5 {
            assert!(queue.give(&[number; 60]));
        }
        machine.turns();
        machine.give_buffers(2, 1526);
        machine.give_buffers(9, 1526);
        let received = machine.received();
        let first: Vec<u8> = received.iter().map(|(_, frame)| frame[0]).collect();
        assert_eq!(first, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_frame_that_fits_no_buffer_is_dropped() {
        let (mut machine, queue) = queue(0);
        machine.give_buffers(1, 100);
        assert!(queue.give(&[1; 200]) && queue.give(&[2; 60]));
        machine.turns();
        assert_eq!(machine.received()[0].1, [2; 60]);
        assert_eq!(machine.net.counts().receive_dropped, 1);
    }

    #[test]
    fn malformed_frames_are_given_back_and_counted() {
        let (mut machine, queue) = queue(CSUM);
        machine.send(&Offload::NONE, &[1; 5]);
        let outside =
            Offload { checksum: Some(Checksum { start: 50, offset: 16 }), ..Offload::NONE };
        machine.send(&outside, &[1; 60]);
        machine.send(&Offload::NONE, &vec![1; Frame::LONGEST + 1]);
        machine.driver.add(1, &[readable(SEND, 5)]).unwrap();
        machine.driver.notify(1);
        machine.turns();
        assert_eq!(std::iter::from_fn(|| machine.driver.used(1)).count(), 4);
        assert_eq!((machine.net.counts().send_dropped, queue.take(9).len()), (4, 0));
        machine.send(&Offload::NONE, &[3; 60]);
        assert_eq!(queue.take(9), [[3; 60]]);
    }

    #[test]
    fn what_the_backend_does_not_do_the_device_does() {
        let (mut machine, queue) = queue(CSUM | HOST_TSO4);
        let (frame, offload) = segment(2500);
        machine.send(&offload, &frame);
        let frames = queue.take(9);
        assert_eq!(frames.iter().map(Vec::len).collect::<Vec<_>>(), [1054, 1054, 554]);
        let payload: Vec<u8> = frames.iter().flat_map(|frame| frame[54..].to_vec()).collect();
        assert_eq!(payload, frame[54..]);
    }

    /// Gives one frame with an offload, which no socket can.
    #[derive(Debug)]
    struct Gives(Vec<u8>, Offload, FrameQueue);

    impl NetBackend for Gives {
        fn watched(&self) -> crate::net::Watched {
            self.2.watched()
        }

        fn send(&self, frames: &[Frame<'_>]) -> usize {
            frames.len()
        }

        fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
            self.2.receive(budget, &mut |_| into(Frame { bytes: &self.0, offload: self.1 }));
        }

        fn describe(&self) -> String {
            "gives".into()
        }

        fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
            self
        }
    }

    fn gives(features: u64) -> (Machine, Arc<Gives>) {
        let (frame, offload) = segment(2500);
        let backend =
            Arc::new(Gives(frame, offload, Arc::into_inner(FrameQueue::new(4).unwrap()).unwrap()));
        (Machine::new(Arc::clone(&backend) as _, features), backend)
    }

    #[test]
    fn a_guest_with_offloads_gets_frames_whole_and_another_gets_them_cut() {
        let (mut machine, backend) = gives(GUEST_CSUM | GUEST_TSO4 | MRG_RXBUF);
        machine.give_buffers(3, 1526);
        assert!(backend.2.give(&[0; 14]));
        machine.turns();
        let received = machine.received();
        assert_eq!((received.len(), &received[0].1), (1, &backend.0));
        assert_eq!(received[0].0, [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0, 2, 0]);

        let (mut machine, backend) = gives(MRG_RXBUF);
        machine.give_buffers(2, 1526);
        assert!(backend.2.give(&[0; 14]));
        machine.turns();
        machine.give_buffers(2, 1526);
        let received = machine.received();
        let lengths: Vec<_> = received.iter().map(|(_, frame)| frame.len()).collect();
        assert_eq!(lengths, [1054, 1054, 554], "the last had to wait for room");
    }

    #[test]
    fn a_slow_peer_holds_frames_up_and_loses_none() {
        let (own, peer) = UnixDatagram::pair().unwrap();
        let mut machine = Machine::new(DatagramSocket::new(own.into()).unwrap(), 0);
        let mut sent = 0_u32;
        for _ in 0..200 {
            machine.add(&Offload::NONE, &[8; 20_000]);
            sent += 1;
        }
        machine.driver.notify(1);
        machine.turns();
        let mut back = std::iter::from_fn(|| machine.driver.used(1)).count();
        assert!(back < 200, "the peer's queue is shorter");
        let mut bytes = [0; 20_001];
        for _ in 0..sent {
            assert_eq!(peer.recv(&mut bytes).unwrap(), 20_000);
            machine.turns();
        }
        back += std::iter::from_fn(|| machine.driver.used(1)).count();
        assert_eq!((back, machine.net.counts().sent), (200, 200));
    }

    #[test]
    fn a_peer_that_closes_takes_the_link_down() {
        let (own, peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut machine = Machine::new(StreamSocket::new(own.into()).unwrap(), STATUS);
        machine.give_buffers(2, 1526);
        assert_eq!((machine.link_status(), machine.net.is_up()), (1, true));
        drop(peer);
        machine.turns();
        assert_eq!(machine.link_status(), 0);
        assert_eq!(machine.driver.interrupt_status() & 2, 2, "a change of the configuration");
        let failure = super::super::VirtioDevice::failure(&*machine.net).unwrap();
        assert!(failure.contains("the peer has closed it"), "{failure}");
        machine.send(&Offload::NONE, &[1; 60]);
        assert_eq!(machine.net.counts().send_dropped, 1, "the driver gets its frame back");

        let queue = FrameQueue::new(4).unwrap();
        machine.net.connect(Arc::clone(&queue) as _);
        machine.turns();
        assert_eq!(machine.link_status(), 1, "another backend brings it up");
        machine.send(&Offload::NONE, &[2; 60]);
        assert_eq!(queue.take(9), [[2; 60]]);
    }

    #[test]
    fn an_unplugged_cable_drops_frames_and_the_next_ones_arrive() {
        let (mut machine, queue) = queue(STATUS);
        machine.give_buffers(4, 1526);
        machine.net.set_link(false);
        assert_eq!(machine.link_status(), 0);
        assert!(queue.give(&[1; 60]));
        machine.send(&Offload::NONE, &[1; 60]);
        machine.net.set_link(true);
        assert!(queue.give(&[2; 60]));
        machine.send(&Offload::NONE, &[2; 60]);
        assert_eq!(machine.received().len(), 1);
        assert_eq!(queue.take(9), [[2; 60]]);
        let counts = machine.net.counts();
        assert_eq!((counts.receive_dropped, counts.send_dropped), (1, 1));
    }

    #[test]
    fn a_backend_in_use_is_exchanged_by_the_loop() {
        let (mut machine, former) = queue(0);
        let next = FrameQueue::new(4).unwrap();
        machine.net.connect(Arc::clone(&next) as _);
        machine.turns();
        assert!(former.is_closed() && !next.is_closed());
        machine.give_buffers(1, 1526);
        assert!(next.give(&[4; 60]));
        machine.turns();
        assert_eq!(machine.received()[0].1, [4; 60]);
    }

    #[test]
    fn commands_set_the_filter() {
        let (mut machine, queue) = queue(CTRL_VQ | CTRL_RX | MRG_RXBUF);
        machine.give_buffers(4, 1526);
        machine.driver.memory.write(SEND, &[0, 0, 0]).unwrap();
        let command: [Buffer; 2] = [readable(SEND, 3), writable(SEND + 8, 1)];
        assert_eq!(machine.driver.exchange(2, &command), Some(1));
        assert_eq!(machine.read(SEND + 8, 1), [0]);
        machine.driver.memory.write(SEND, &[77]).unwrap();
        assert_eq!(machine.driver.exchange(2, &command), Some(1));
        assert_eq!(machine.read(SEND + 8, 1), [1], "no such command");
        assert!(queue.give(&[2; 60]));
        assert!(queue.give(&[&MAC_ADDRESS[..], &[9; 54]].concat()));
        machine.turns();
        let received = machine.received();
        assert_eq!(received.len(), 1);
        assert_eq!(received[0].1[6], 9);
    }

    #[test]
    fn a_state_is_saved_and_restored() {
        use super::super::VirtioDevice;
        let (machine, _queue) = queue(0);
        machine.net.set_link(false);
        let (state, spec) = (machine.net.save().unwrap(), machine.net.spec());
        let copy = Net::from_spec(&spec, None).unwrap();
        copy.restore(&state).unwrap();
        assert_eq!(
            (copy.mac(), copy.mtu(), copy.save().unwrap()),
            (MAC_ADDRESS, Some(1400), state)
        );
        assert!(copy.failure().unwrap().contains("not connected"));
        assert!(copy.restore(&[1]).is_err() && Net::from_spec(&[1], None).is_err());
    }

    #[test]
    fn a_capture_has_the_frames_of_both_directions() {
        let path = std::env::temp_dir().join(format!("pyvmm-net-{}.pcap", std::process::id()));
        let (mut machine, queue) = queue(0);
        machine.net.capture(Some(&path)).unwrap();
        machine.give_buffers(4, 1526);
        machine.send(&Offload::NONE, &[1; 60]);
        assert!(queue.give(&[2; 60]));
        machine.turns();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 24 + 2 * (16 + 60));
        let capture = machine.net.capture(None).unwrap().unwrap();
        assert_eq!(capture.frames(), 2);
        std::fs::remove_file(&path).unwrap();
    }
}
