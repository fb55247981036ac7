//! A driver of the socket device for its tests: it gives the device buffers to receive, and sends
//! packets.

#![cfg(test)]

use std::collections::VecDeque;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::device::VirtioDevice;
use super::mock::{MockDriver, readable, writable};
use super::vsock::{RX, STREAM, TX, Vsock};
use crate::config::VsockConfig;
use crate::vsock::{HEADER_SIZE, HOST_CID, Header, STREAM as STREAM_TYPE, op};

pub(super) const AT: u64 = MockDriver::BUFFERS;
/// Where packets are received, by descriptor, and sent from.
pub(super) const SLOT: u64 = 0x2000;
pub(super) const SENT: u64 = AT + 256 * SLOT;

/// A driver: it gives the device buffers to receive, and sends packets.
pub(super) struct Guest {
    pub(super) driver: MockDriver,
    pub(super) device: Arc<Vsock>,
    /// Where each receive buffer is, by its head.
    pub(super) posted: Vec<(u16, u64)>,
    pub(super) received: VecDeque<(Header, Vec<u8>)>,
    pub(super) size: u32,
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::with(&VsockConfig::default(), 64)
    }

    pub(super) fn with(config: &VsockConfig, buffers: u64) -> Self {
        let device = Arc::new(Vsock::new(config).unwrap());
        let as_device: Arc<dyn VirtioDevice> = device.clone();
        let mut driver = MockDriver::new(as_device, 16).unwrap();
        assert_eq!(driver.start(STREAM), 15);
        let (posted, received) = (Vec::new(), VecDeque::new());
        let mut guest = Self { driver, device, posted, received, size: 4096 };
        (0..buffers).for_each(|slot| guest.post(AT + slot * SLOT));
        guest.driver.notify(0);
        guest.turn();
        guest
    }

    pub(super) fn post(&mut self, at: u64) {
        let rest = self.size - 44;
        let chain = [writable(at, 40), writable(at + 40, 4), writable(at + 44, rest)];
        let head = self.driver.add(RX, &chain).unwrap();
        self.posted.push((head, at));
    }

    /// Run the loop until nothing is ready, and take what was received. Returns how many events
    /// there were.
    pub(super) fn turn(&mut self) -> usize {
        let mut events = 0;
        loop {
            match self.driver.turn(0).unwrap() {
                0 => break,
                count => events += count,
            }
            assert!(events < 100_000, "it spins");
        }
        while self.driver.used(TX).is_some() {}
        let mut has_posted = false;
        while let Some((head, length)) = self.driver.used(RX) {
            let place = self.posted.iter().position(|(other, _)| *other == head).unwrap();
            let (_, at) = self.posted.remove(place);
            let mut bytes = [0; HEADER_SIZE];
            self.driver.memory.read(at, &mut bytes).unwrap();
            let header = Header::from(bytes);
            assert_eq!(length, 44 + header.len);
            let mut data = vec![0; usize::try_from(header.len).unwrap()];
            self.driver.memory.read(at + 44, &mut data).unwrap();
            self.received.push_back((header, data));
            self.post(at);
            has_posted = true;
        }
        if has_posted {
            self.driver.notify(0);
            events += self.turn();
        }
        events
    }

    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let bytes: [u8; HEADER_SIZE] = Header { len, ..header }.into();
        self.driver.memory.write(SENT, &bytes).unwrap();
        self.driver.memory.write(SENT + 44, data).unwrap();
        let mut chain = vec![readable(SENT, 10), readable(SENT + 10, 34)];
        if len > 0 {
            chain.extend([readable(SENT + 44, 1), readable(SENT + 45, len - 1)]);
        }
        self.driver.exchange(1, &chain).unwrap();
        self.turn();
    }

    /// A packet of the connection between these ports of the host and the guest.
    pub(super) fn packet(ports: (u32, u32), op: u16) -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: ports.1,
            dst_port: ports.0,
            kind: STREAM_TYPE,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        }
    }

    pub(super) fn connected(&mut self, port: u32) -> ((u32, u32), UnixStream) {
        let mut end = UnixStream::from(self.device.connect(port).unwrap());
        self.turn();
        let (request, _) = self.received.pop_back().unwrap();
        assert_eq!((request.op, request.dst_port, request.dst_cid), (op::REQUEST, port, 3));
        let ports = (request.src_port, port);
        self.send(Self::packet(ports, op::RESPONSE), &[]);
        let mut greeting = [1];
        end.read_exact(&mut greeting).unwrap();
        (ports, end)
    }

    pub(super) fn ops(&mut self) -> Vec<u16> {
        self.received.drain(..).map(|(header, _)| header.op).collect()
    }
}
