//! A guest for tests: it keeps to the rules unless a test breaks them, and checks that the host
//! does.

#![cfg(test)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use event_manager::EventSet;
use vm_memory::VolatileSlice;

use super::mux::Mux;
use super::packet::{HOST_CID, Header, STREAM, op};

pub(super) const CID: u64 = 3;

/// The byte at a position of every stream.
pub(super) fn byte_at(position: u32) -> u8 {
    (position ^ position >> 8).to_le_bytes()[0]
}

/// The bytes of a stream from a position on.
pub(super) fn bytes_from(position: u32, count: u32) -> Vec<u8> {
    (0..count).map(|offset| byte_at(position.wrapping_add(offset))).collect()
}

/// A connection, as the guest has it.
#[derive(Clone, Debug)]
pub(super) struct Side {
    pub(super) is_established: bool,
    /// Its own buffer, and what is in it.
    pub(super) buffer: u32,
    pub(super) received: u32,
    pub(super) consumed: u32,
    pub(super) sent: u32,
    pub(super) host_buffer: u32,
    pub(super) host_forwarded: u32,
    /// Flags of SHUTDOWN that came, and that went.
    pub(super) ended_by_host: u32,
    pub(super) ended: u32,
    pub(super) is_reset: bool,
    pub(super) was_asked: usize,
}

impl Side {
    fn new(buffer: u32) -> Self {
        Self {
            is_established: false,
            buffer,
            received: 0,
            consumed: 0,
            sent: 0,
            host_buffer: 0,
            host_forwarded: 0,
            ended_by_host: 0,
            ended: 0,
            is_reset: false,
            was_asked: 0,
        }
    }

    pub(super) fn credit(&self) -> u32 {
        self.host_buffer - self.sent.wrapping_sub(self.host_forwarded)
    }
}

/// See the module. Its connections are found by host port and guest port.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) mux: Mux,
    pub(super) sides: BTreeMap<(u32, u32), Side>,
    /// How large the buffer of a new connection is, and that of a received packet.
    pub(super) buffer: u32,
    pub(super) room: usize,
    pub(super) refuses: bool,
    /// All packets that came.
    pub(super) packets: Vec<Header>,
    folder: vmm_sys_util::tempdir::TempDir,
}

impl Guest {
    pub(super) fn new() -> Self {
        let mut mux = Mux::new(CID, None);
        mux.start();
        let folder = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let (sides, packets) = (BTreeMap::new(), Vec::new());
        Self { mux, sides, buffer: 64 << 10, room: 4096, refuses: false, packets, folder }
    }

    pub(super) fn header(&self, ports: (u32, u32), op: u16) -> Header {
        let side = self.sides.get(&ports).cloned().unwrap_or(Side::new(self.buffer));
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.1,
            dst_port: ports.0,
            kind: STREAM,
            op,
            buf_alloc: side.buffer,
            fwd_cnt: side.consumed,
            ..Header::default()
        }
    }

    pub(super) fn send(&mut self, ports: (u32, u32), op: u16) {
        let header = self.header(ports, op);
        self.mux.take_from_guest(&header, &[]);
    }

    pub(super) fn shut_down(&mut self, ports: (u32, u32), flags: u32) {
        if let Some(side) = self.sides.get_mut(&ports) {
            side.ended |= flags;
        }
        let header = Header { flags, ..self.header(ports, op::SHUTDOWN) };
        self.mux.take_from_guest(&header, &[]);
    }

    /// Send data, whatever the credit is.
    pub(super) fn write(&mut self, ports: (u32, u32), data: &mut [u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let header = Header { len, ..self.header(ports, op::RW) };
        self.sides.get_mut(&ports).unwrap().sent += len;
        let (one, other) = data.split_at_mut(data.len() / 3);
        let payload = [VolatileSlice::from(one), VolatileSlice::from(other)];
        self.mux.take_from_guest(&header, &payload);
    }

    /// Send the next bytes of the stream, within the credit. Returns how many.
    pub(super) fn stream(&mut self, ports: (u32, u32), most: u32) -> u32 {
        let side = &self.sides[&ports];
        let count = most.min(side.credit());
        if count > 0 {
            let mut data = bytes_from(side.sent, count);
            self.write(ports, &mut data);
        }
        count
    }

    /// Take bytes out of the buffer, and tell the host.
    pub(super) fn consume(&mut self, ports: (u32, u32), most: u32) {
        let side = self.sides.get_mut(&ports).unwrap();
        side.consumed += most.min(side.received - side.consumed);
        self.send(ports, op::CREDIT_UPDATE);
    }

    /// A connection that the guest requests.
    pub(super) fn connect(&mut self, host: u32, guest: u32) -> (u32, u32) {
        self.sides.insert((host, guest), Side::new(self.buffer));
        self.send((host, guest), op::REQUEST);
        (host, guest)
    }

    /// A connection that the host requests: the ports, and its end.
    pub(super) fn connected(&mut self, port: u32) -> ((u32, u32), UnixStream) {
        let mut end = end(self.mux.connect(port).unwrap());
        self.turn(usize::MAX);
        let ports = *self.sides.keys().rfind(|ports| ports.1 == port).unwrap();
        assert!(self.sides[&ports].is_established);
        let mut greeting = [1];
        end.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, [0]);
        (ports, end)
    }

    pub(super) fn listen(&mut self, port: u32) -> UnixListener {
        let path = self.folder.as_path().join(port.to_string());
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.mux.listen(port, handle(&path)).unwrap();
        std::fs::remove_file(&path).unwrap();
        listener
    }

    /// Tell the mux of sockets that are ready, and take at most this many packets.
    pub(super) fn turn(&mut self, most: usize) {
        let sockets = self.mux.connections.iter();
        let sockets: Vec<_> =
            sockets.filter_map(|(id, c)| Some((*id, c.socket.as_ref()?.as_raw_fd()))).collect();
        for (id, fd) in sockets {
            let events = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
            let mut poll = libc::pollfd { fd, events, revents: 0 };
            // SAFETY: one pollfd that lives through the call, which does not wait.
            unsafe { libc::poll(&raw mut poll, 1, 0) };
            let events = EventSet::from_bits_truncate(u32::from(poll.revents.cast_unsigned()));
            self.mux.process_event(id, events);
        }
        for _ in 0..most {
            let mut room = vec![0; self.room];
            let (one, other) = room.split_at_mut(self.room / 4);
            let pieces = [VolatileSlice::from(one), VolatileSlice::from(other)];
            let Some(header) = self.mux.give_to_guest(&pieces) else { break };
            self.take(header, &room[..usize::try_from(header.len).unwrap()]);
        }
        self.mux.retired.clear();
    }

    fn take(&mut self, header: Header, data: &[u8]) {
        self.packets.push(header);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        let ports = (header.src_port, header.dst_port);
        if header.op == op::REQUEST {
            assert!(!self.sides.contains_key(&ports), "the ports are in use");
            if self.refuses {
                return self.send(ports, op::RST);
            }
            self.sides.insert(ports, Side { is_established: true, ..Side::new(self.buffer) });
            self.send(ports, op::RESPONSE);
        }
        let Some(side) = self.sides.get_mut(&ports) else { return };
        if header.op != op::RST {
            (side.host_buffer, side.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
        }
        match header.op {
            op::RST => side.is_reset = true,
            op::RESPONSE => side.is_established = true,
            op::RW => {
                assert!(!data.is_empty());
                assert_eq!(side.ended_by_host & 2, 0, "data after the end");
                assert_eq!(data, bytes_from(side.received, header.len));
                side.received += header.len;
                assert!(side.received - side.consumed <= side.buffer, "more than the credit");
            }
            op::SHUTDOWN => {
                side.ended_by_host |= header.flags;
                if side.ended_by_host == 3 && side.received == side.consumed {
                    side.is_reset = true;
                    self.send(ports, op::RST);
                }
            }
            op::CREDIT_REQUEST => {
                side.was_asked += 1;
                self.send(ports, op::CREDIT_UPDATE);
            }
            _ => {}
        }
    }
}

/// The program's end of a connection, which does not wait.
pub(super) fn end(fd: OwnedFd) -> UnixStream {
    let end = UnixStream::from(fd);
    end.set_nonblocking(true).unwrap();
    end
}

pub(super) fn handle(path: &Path) -> OwnedFd {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).custom_flags(libc::O_PATH).open(path).unwrap().into()
}

/// Write what the socket takes of a stream. Returns how much.
pub(super) fn write_some(end: &mut UnixStream, position: u32, most: u32) -> u32 {
    match end.write(&bytes_from(position, most)) {
        Ok(count) => u32::try_from(count).unwrap(),
        Err(_) => 0,
    }
}

/// Read what there is of a stream, and check it. Returns how much, and whether it has ended.
pub(super) fn read_some(end: &mut UnixStream, position: u32, most: u32) -> (u32, bool) {
    let mut bytes = vec![0; usize::try_from(most).unwrap()];
    match end.read(&mut bytes) {
        Ok(0) if most > 0 => (0, true),
        Ok(count) => {
            let count = u32::try_from(count).unwrap();
            assert_eq!(bytes[..usize::try_from(count).unwrap()], bytes_from(position, count));
            (count, false)
        }
        Err(e) => (0, e.kind() != std::io::ErrorKind::WouldBlock),
    }
}
