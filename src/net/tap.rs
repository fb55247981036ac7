//! A tap interface of the host: by name, or an open file descriptor of one. Frames have virtio's
//! header before them, so that checksums and segmentation are left to the host's kernel, or to the
//! guest. On the loop's thread.

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::backend::{Frame, NetBackend, Offloads, Watched};
use super::ending::Ending;
use super::header::{HEADER, decode, encode};
use super::socket::{counted, part};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

const DEVICE: &str = "/dev/net/tun";
const TUNSETIFF: u64 = 0x4004_54ca;
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;

/// The first bytes of `struct ifreq`: a name, and flags.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

#[derive(Debug)]
struct Incoming {
    bytes: Vec<u8>,
    /// Of a frame that the guest had no room for.
    length: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    incoming: Mutex<Incoming, rank::NetBackend>,
    ending: Ending,
}

impl Tap {
    /// Open the tap interface of this name. One that does not exist is created, which needs
    /// CAP_NET_ADMIN, and disappears with the machine.
    ///
    /// # Errors
    /// If the host has no tap interfaces, or the process may not open this one.
    pub fn open(name: &str) -> Result<Arc<Self>> {
        let at = || format!("tap {name}");
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
            let detail = "the name of an interface has 1 to 15 bytes";
            return Err(Error::new(ErrorKind::Config, at(), detail));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|e| {
                Error::os(ErrorKind::Io, DEVICE, &e).hint("load the kernel's module tun")
            })?;
        let mut request = Request { name: [0; 16], flags: flags(), rest: [0; 22] };
        request.name.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
        ioctl_request(&file, TUNSETIFF, &mut request).map_err(|e| {
            Error::os(ErrorKind::Io, at(), &e).hint(
                "create it for your user: ip tuntap add dev NAME mode tap vnet_hdr user $USER",
            )
        })?;
        Self::over(file, request)
    }

    /// Over an open descriptor of a tap interface, such as a manager of networks passes.
    ///
    /// # Errors
    /// If it is none, or one that was opened without IFF_VNET_HDR or IFF_NO_PI.
    pub fn new(fd: OwnedFd) -> Result<Arc<Self>> {
        let at = format!("tap descriptor {}", fd.as_raw_fd());
        let file = File::from(fd);
        let mut request = Request { name: [0; 16], flags: 0, rest: [0; 22] };
        ioctl_request(&file, TUNGETIFF, &mut request)
            .map_err(|e| Error::os(ErrorKind::Config, at.clone(), &e))?;
        if request.flags & flags() != flags() {
            let detail = "it was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR";
            return Err(Error::new(ErrorKind::Config, at, detail));
        }
        // SAFETY: no pointers; the descriptor is ours, and other holders of the file are only
        // spared a wait.
        let set = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        if set < 0 {
            return Err(Error::os(ErrorKind::Io, at, &io::Error::last_os_error()));
        }
        Self::over(file, request)
    }

    fn over(file: File, request: Request) -> Result<Arc<Self>> {
        let name = request.name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).into_owned();
        let size = libc::c_int::try_from(HEADER).unwrap_or(0);
        // SAFETY: the size is a local that the call reads.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) };
        if result < 0 {
            let error = io::Error::last_os_error();
            return Err(Error::os(ErrorKind::Io, format!("tap {name}"), &error));
        }
        let bytes = vec![0; HEADER + Frame::LONGEST];
        let incoming = Mutex::new(Incoming { bytes, length: 0 });
        let tap = Arc::new(Self { file, name, incoming, ending: Ending::default() });
        tap.guest_offloads(Offloads::default());
        Ok(tap)
    }

    /// The name of the interface.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// False if it is full.
    fn write(&self, frame: &Frame<'_>) -> bool {
        let header = encode(&frame.offload, 0);
        let parts = [part(&header), part(frame.bytes)];
        let fd = self.file.as_raw_fd();
        loop {
            // SAFETY: two parts, slices that live through the call, which reads them.
            let Err(error) = counted(unsafe { libc::writev(fd, parts.as_ptr(), 2) }) else {
                return true;
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => return false,
                Some(libc::EBADFD) => {
                    self.ending.end(&gone());
                    self.ending.drop(1);
                    return true;
                }
                // The interface is down, or the kernel refuses the frame.
                _ => {
                    self.ending.drop(1);
                    return true;
                }
            }
        }
    }

    /// Read a frame. False if there is none.
    fn read(&self, incoming: &mut Incoming) -> bool {
        loop {
            let room = &mut incoming.bytes;
            // SAFETY: the pointer and length are those of the buffer.
            let result = counted(unsafe {
                libc::read(self.file.as_raw_fd(), room.as_mut_ptr().cast(), room.len())
            });
            match result {
                Ok(length) => {
                    incoming.length = length;
                    return length > 0;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // EIO: the interface is down.
                    if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EIO)) {
                        self.ending.end(&gone());
                    }
                    return false;
                }
            }
        }
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the tap interface was removed")
}

fn flags() -> u16 {
    [libc::IFF_TAP, libc::IFF_NO_PI, libc::IFF_VNET_HDR]
        .iter()
        .fold(0, |all, flag| all | u16::try_from(*flag).unwrap_or(0))
}

fn ioctl_request(file: &File, number: u64, request: &mut Request) -> io::Result<()> {
    // SAFETY: the request is as long as `struct ifreq`, which the call reads and writes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number as _, &raw mut *request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl NetBackend for Tap {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true, ecn: true }
    }

    fn guest_offloads(&self, guest: Offloads) {
        let all = [
            (guest.checksum, TUN_F_CSUM),
            (guest.checksum && guest.tso4, TUN_F_TSO4),
            (guest.checksum && guest.tso6, TUN_F_TSO6),
            (guest.checksum && guest.ecn && (guest.tso4 || guest.tso6), TUN_F_TSO_ECN),
        ];
        let offloads = all.iter().filter(|(is_on, _)| *is_on).fold(0, |all, (_, bit)| all | bit);
        // SAFETY: no pointers. If the kernel refuses it, it leaves nothing to the guest.
        let _ = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD as _, offloads) };
    }

    fn watched(&self) -> Watched {
        let fd = self.file.as_raw_fd();
        Watched { receive: fd, send: fd }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        if self.ending.drops(frames.len()) {
            return frames.len();
        }
        frames.iter().take_while(|frame| self.write(frame)).count()
    }

    fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
        let mut incoming = self.incoming.lock();
        for _ in 0..budget {
            if incoming.length == 0 && !self.read(&mut incoming) {
                return;
            }
            let whole = incoming.bytes.get(..incoming.length).unwrap_or_default();
            let frame = whole.split_first_chunk().and_then(|(header, rest)| decode(header, rest));
            match frame {
                Some(frame) if !into(frame) => return,
                Some(_) => {}
                None => self.ending.drop(1),
            }
            incoming.length = 0;
        }
    }

    fn failure(&self) -> Option<String> {
        self.ending.reason()
    }

    fn dropped(&self) -> u64 {
        self.ending.dropped()
    }

    fn reset(&self) {
        let mut incoming = self.incoming.lock();
        incoming.length = 0;
        // As many as the interface queues by default.
        for _ in 0..1000 {
            if !self.read(&mut incoming) {
                break;
            }
        }
        incoming.length = 0;
    }

    fn describe(&self) -> String {
        format!("tap {}", self.name)
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Root may make interfaces, in a network namespace of the test's thread.
    fn tap(name: &str) -> Option<Arc<Tap>> {
        // SAFETY: it affects only this thread, which is the test's own.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
            return None;
        }
        Tap::open(name).ok()
    }

    fn ip(arguments: &[&str]) -> bool {
        std::process::Command::new("ip").args(arguments).status().is_ok_and(|done| done.success())
    }

    #[test]
    fn frames_go_to_the_interface_until_it_is_removed() {
        let Some(tap) = tap("pyvmm0") else { return };
        assert_eq!((tap.name(), tap.describe().as_str()), ("pyvmm0", "tap pyvmm0"));
        let frame = [0xff; 60];
        assert_eq!(tap.send(&[Frame::complete(&frame)]), 1);
        assert_eq!((tap.dropped(), tap.failure()), (1, None), "it is down");
        if !ip(&["link", "set", "pyvmm0", "up"]) {
            return;
        }
        assert_eq!(tap.send(&[Frame::complete(&frame)]), 1);
        assert_eq!(tap.dropped(), 1);
        // An interface that is up announces itself over IPv6, or it has nothing to say.
        tap.receive(10, &mut |frame| {
            assert!(frame.bytes.len() >= 14);
            true
        });
        assert!(ip(&["link", "delete", "pyvmm0"]));
        tap.receive(10, &mut |_| true);
        assert_eq!(tap.failure().unwrap(), "the tap interface was removed");
        assert_eq!(tap.send(&[Frame::complete(&frame)]), 1);
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let error = Tap::new(null.into()).unwrap_err();
        assert!(error.to_string().starts_with("tap descriptor "), "{error}");
        let error = Tap::open("a-name-that-is-too-long").unwrap_err();
        assert!(error.detail.contains("1 to 15 bytes"), "{error}");
    }
}
