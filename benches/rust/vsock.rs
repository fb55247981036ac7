//! A unix socket whose other end is a guest's socket, and one whose other end is a thread: round
//! trips of a byte a second, or bytes a second. Arguments: "trip", "to-guest" or "to-host";
//! "device" or "bare"; how many trips, or bytes.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pyvmm::config::VsockConfig;
use pyvmm::virtio::Vsock;
use pyvmm::virtio::mock::{MockDriver, readable, writable};
use pyvmm::vsock::{BUFFER, HEADER_SIZE, HOST_CID, Header, STREAM, op};

const PORT: u32 = 52;
const BLOCK: usize = 64 << 10;
/// As many buffers of this size receive, as Linux has them.
const BUFFERS: u64 = 64;
const ROOM: u32 = 4096;
const SENT: u64 = MockDriver::BUFFERS + BUFFERS * 0x1000;

/// A driver with one connection.
struct Guest {
    driver: MockDriver,
    /// The buffer of each chain to receive, by its head.
    posted: [u64; 256],
    host_port: u32,
    received: u32,
    sent: u32,
    /// How much the host has taken.
    forwarded: u32,
}

impl Guest {
    fn new() -> (Self, UnixStream) {
        let device = Arc::new(Vsock::new(&VsockConfig::default()).unwrap());
        let mut driver = MockDriver::new(Arc::<Vsock>::clone(&device), 16).unwrap();
        assert_eq!(driver.start(1), 15);
        let (posted, host_port) = ([0; 256], 0);
        let mut guest = Self { driver, posted, host_port, received: 0, sent: 0, forwarded: 0 };
        (0..BUFFERS).for_each(|slot| guest.post(MockDriver::BUFFERS + slot * 0x1000));
        guest.driver.notify(0);
        let mut end = UnixStream::from(device.connect(PORT).unwrap());
        guest.host_port = guest.receive().src_port;
        guest.send(op::RESPONSE, 0);
        end.read_exact(&mut [0]).unwrap();
        (guest, end)
    }

    fn post(&mut self, at: u64) {
        let head = self.driver.add(0, &[writable(at, ROOM)]).unwrap();
        self.posted[usize::from(head)] = at;
    }

    /// Take a packet that has come.
    fn take(&mut self) -> Option<Header> {
        let (head, _) = self.driver.used(0)?;
        let at = self.posted[usize::from(head)];
        let mut bytes = [0; HEADER_SIZE];
        self.driver.memory.read(at, &mut bytes).unwrap();
        self.post(at);
        let header = Header::from(bytes);
        self.received += header.len;
        self.forwarded = header.fwd_cnt;
        Some(header)
    }

    fn receive(&mut self) -> Header {
        loop {
            if let Some(header) = self.take() {
                return header;
            }
            self.driver.turn(1000).unwrap();
        }
    }

    fn send(&mut self, op: u16, len: u32) {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: self.host_port,
            len,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: 4 * BUFFER,
            fwd_cnt: self.received,
        };
        let bytes: [u8; HEADER_SIZE] = header.into();
        self.driver.memory.write(SENT, &bytes).unwrap();
        self.sent += len;
        let size = u32::try_from(HEADER_SIZE).unwrap() + len;
        self.driver.add(1, &[readable(SENT, size)]).unwrap();
        self.driver.notify(1);
        while self.driver.used(1).is_none() {
            self.driver.turn(1000).unwrap();
        }
    }

    fn trips(&mut self, count: u32) {
        for _ in 0..count {
            while self.receive().op != op::RW {}
            self.driver.notify(0);
            self.send(op::RW, 1);
        }
    }

    fn fill_guest(&mut self, total: u32) {
        let mut told = 0;
        while self.received < total {
            self.receive();
            while self.take().is_some() {}
            self.driver.notify(0);
            if self.received - told > BUFFER {
                told = self.received;
                self.send(op::CREDIT_UPDATE, 0);
            }
        }
    }

    fn fill_host(&mut self, total: u32) {
        let block = u32::try_from(BLOCK).unwrap();
        while self.sent < total {
            while self.sent + block - self.forwarded > BUFFER {
                self.receive();
                self.driver.notify(0);
            }
            self.send(op::RW, block);
        }
        while self.forwarded < total {
            self.send(op::CREDIT_REQUEST, 0);
            self.receive();
        }
    }
}

/// The program's side.
fn host(end: &mut UnixStream, what: &str, count: u32) {
    let mut block = vec![0; BLOCK];
    let mut left = usize::try_from(count).unwrap();
    match what {
        "trip" => {
            for _ in 0..count {
                end.write_all(&[1]).unwrap();
                end.read_exact(&mut block[..1]).unwrap();
            }
        }
        "to-guest" => {
            while left > 0 {
                end.write_all(&block).unwrap();
                left -= BLOCK;
            }
        }
        _ => {
            while left > 0 {
                left -= end.read(&mut block).unwrap();
            }
        }
    }
}

/// What a thread does in the place of a device.
fn bare(end: &mut UnixStream, what: &str, count: u32) {
    match what {
        "trip" => {
            for _ in 0..count {
                end.read_exact(&mut [0]).unwrap();
                end.write_all(&[1]).unwrap();
            }
        }
        "to-guest" => host(end, "to-host", count),
        _ => host(end, "to-guest", count),
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, side, count] = arguments.try_into().unwrap();
    let count: u32 = count.parse().unwrap();
    let (guest, mut end) = if side == "device" {
        let (guest, end) = Guest::new();
        (Ok(guest), end)
    } else {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Err(ours), theirs)
    };
    let of_host = what.clone();
    let start = Instant::now();
    let program = thread::spawn(move || host(&mut end, &of_host, count));
    match guest {
        Ok(mut guest) => match what.as_str() {
            "trip" => guest.trips(count),
            "to-guest" => guest.fill_guest(count),
            _ => guest.fill_host(count),
        },
        Err(mut ours) => bare(&mut ours, &what, count),
    }
    program.join().unwrap();
    println!("{}", f64::from(count) / start.elapsed().as_secs_f64());
}
