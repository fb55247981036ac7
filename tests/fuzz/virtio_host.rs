//! The devices that inputs are for, and the host's side of them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pyvmm::config::{
    BalloonConfig, ConsoleConfig, ConsolePort, CustomConfig, CustomProgram, DiskConfig, RngConfig,
    ShareConfig, VsockConfig,
};
use pyvmm::disk::{Contents, Format};
use pyvmm::error::Result;
use pyvmm::net::DatagramSocket;
use pyvmm::share::Options;
use pyvmm::virtio::mock::MockDriver;
use pyvmm::virtio::{Balloon, Blk, Chain, Console, Custom, Fs9p, Net, Rng, VirtioDevice, Vsock};
use vmm_sys_util::tempdir::TempDir;

/// The most connections that the host keeps.
const MOST_STREAMS: usize = 8;
/// The port of the host that listens for the guest.
const PORT: u32 = 1000;
/// What all inputs share: a folder, and a socket that guests connect to.
pub(crate) struct HostFolder {
    folder: TempDir,
    listener: UnixListener,
    image: Vec<u8>,
}

impl HostFolder {
    /// With this qcow2 image for disks.
    pub(crate) fn new(image: Vec<u8>) -> Self {
        let prefix = std::env::temp_dir().join("pyvmm-fuzz-");
        let folder = TempDir::new_with_prefix(prefix).unwrap();
        let listener = UnixListener::bind(folder.as_path().join("socket")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { folder, listener, image }
    }

    fn share(&self) -> PathBuf {
        let shared = self.folder.as_path().join("shared");
        let _ = std::fs::remove_dir_all(&shared);
        std::fs::create_dir_all(shared.join("a/b")).unwrap();
        std::fs::write(shared.join("file"), "Hello").unwrap();
        shared
    }

    fn accept(&self) -> Option<UnixStream> {
        self.listener.accept().ok().map(|(stream, _)| stream)
    }
}

/// A file without a place in the file system, and its path.
fn file_of(bytes: &[u8]) -> (File, PathBuf) {
    // SAFETY: the name ends in a zero byte.
    let fd = unsafe { libc::memfd_create(c"input".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nothing else owns it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

#[derive(Debug)]
struct Program;

impl CustomProgram for Program {
    fn write_config(&self, _offset: u64, _data: &[u8]) -> bool {
        true
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(vec![1, 2, 3])
    }

    fn restore(&self, _state: &[u8]) -> Result<()> {
        Ok(())
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

enum Side {
    Nothing,
    Disk(Arc<Blk>),
    Net(Arc<Net>, UnixDatagram),
    Vsock(Arc<Vsock>),
    Console(Arc<Console>),
    Balloon(Arc<Balloon>),
    Custom(Arc<Custom>, Vec<Chain>),
}

/// The host's side of a device.
pub(crate) struct Host {
    side: Side,
    streams: Vec<UnixStream>,
}

fn disk(contents: Contents) -> (Arc<dyn VirtioDevice>, Side) {
    let config = DiskConfig { serial: "serial".into(), ..DiskConfig::new(contents) };
    let blk = Arc::new(Blk::new(config).unwrap());
    (Arc::clone(&blk) as _, Side::Disk(blk))
}

fn net() -> (Arc<dyn VirtioDevice>, Side) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let backend = DatagramSocket::new(ours.into()).unwrap();
    let net = Arc::new(Net::over(backend, [2, 0, 0, 0, 0, 1], Some(1500)));
    (Arc::clone(&net) as _, Side::Net(net, theirs))
}

fn vsock(place: &HostFolder) -> (Arc<dyn VirtioDevice>, Side) {
    let vsock = Arc::new(Vsock::new(&VsockConfig::default()).unwrap());
    while place.accept().is_some() {}
    let path = place.folder.as_path().join("socket");
    let listener = File::options().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
    vsock.listen(PORT, listener.into()).unwrap();
    (Arc::clone(&vsock) as _, Side::Vsock(vsock))
}

fn console() -> (Arc<dyn VirtioDevice>, Side) {
    let port = |name: &str| ConsolePort { name: name.into(), path: None };
    let config = ConsoleConfig { ports: vec![port("console"), port("log")], size: (80, 25) };
    let console = Arc::new(Console::new(config).unwrap());
    (Arc::clone(&console) as _, Side::Console(console))
}

fn balloon() -> (Arc<dyn VirtioDevice>, Side) {
    let statistics = Some(Duration::from_secs(3600));
    let config = BalloonConfig { target_mib: 1, deflate_on_oom: true, reporting: true, statistics };
    let balloon = Arc::new(Balloon::new(config).unwrap());
    (Arc::clone(&balloon) as _, Side::Balloon(balloon))
}

fn custom() -> (Arc<dyn VirtioDevice>, Side) {
    let (queues, program) = (vec![8, 256, 1], Arc::new(Program));
    let config = CustomConfig { device_type: 42, features: 5, queues, space: vec![7; 20], program };
    let custom = Arc::new(Custom::new(config).unwrap());
    (Arc::clone(&custom) as _, Side::Custom(custom, Vec::new()))
}

impl Host {
    /// A device of a kind, and its host.
    pub(crate) fn new(kind: &str, place: &HostFolder) -> (Arc<dyn VirtioDevice>, Self) {
        let (device, side): (Arc<dyn VirtioDevice>, Side) = match kind {
            "blk" => disk(Contents::Bytes(vec![7; 1 << 16])),
            "qcow2" => {
                // The disk opens the file again.
                let (_file, path) = file_of(&place.image);
                disk(Contents::File(path, Format::Qcow2))
            }
            "net" => net(),
            "vsock" => vsock(place),
            "console" => console(),
            "balloon" => balloon(),
            "fs9p" => {
                let (path, tag) = (place.share(), "share".to_owned());
                let config = ShareConfig { path, tag, options: Options::default() };
                (Arc::new(Fs9p::new(config).unwrap()), Side::Nothing)
            }
            "custom" => custom(),
            _ => (Arc::new(Rng::new(RngConfig { seed: Some(7) })), Side::Nothing),
        };
        (device, Self { side, streams: Vec::new() })
    }

    /// Whether a thread of the device serves its queues.
    pub(crate) fn is_threaded(kind: &str) -> bool {
        matches!(kind, "blk" | "qcow2" | "fs9p")
    }

    /// Whether each chain of a queue is given back soon, to a driver that has these features. A
    /// balloon takes none of a queue that it does not have without its feature.
    pub(crate) fn answers(kind: &str, queue: usize, features: u64) -> bool {
        let has = |bit: u32| features >> bit & 1 != 0;
        let reports = 2 + usize::from(has(1));
        match kind {
            "rng" | "blk" | "qcow2" | "fs9p" => queue == 0,
            "net" => queue > 0,
            "console" => queue == 3,
            "balloon" => queue < 2 || queue == reports && has(5),
            _ => false,
        }
    }

    fn keep(&mut self, stream: impl Into<UnixStream>) {
        let stream = stream.into();
        stream.set_nonblocking(true).unwrap();
        if self.streams.len() == MOST_STREAMS {
            self.streams.remove(0);
        }
        self.streams.push(stream);
    }

    /// Something happens on the host.
    pub(crate) fn act(&mut self, what: u64, with: u64, data: &[u8], driver: &MockDriver) {
        let size = usize::try_from(with % 4096).unwrap();
        let small = u16::try_from(with % 0x1_0000).unwrap();
        match (&mut self.side, what % 4) {
            (Side::Disk(blk), _) => {
                let _ = blk.disk().resize(with % (1 << 20));
                driver.attached.transport.queues().config_changed();
            }
            (Side::Net(net, _), 0) => net.set_link(with & 1 == 0),
            (Side::Net(_, socket), _) => drop(socket.send(&[data, &vec![7; size]].concat())),
            (Side::Vsock(vsock), 0) => {
                if let Ok(stream) = vsock.connect(u32::from(small)) {
                    self.keep(stream);
                }
            }
            (Side::Console(console), 0) => {
                if let Ok(stream) = console.connect(["console", "log"][size % 2]) {
                    self.keep(stream);
                }
            }
            (Side::Console(console), 1) => console.resize(small, small.rotate_left(4)),
            (Side::Vsock(_) | Side::Console(_), 2) if !self.streams.is_empty() => {
                let at = size % self.streams.len();
                drop(self.streams.remove(at));
            }
            (Side::Vsock(_) | Side::Console(_), _) if !self.streams.is_empty() => {
                let at = size % self.streams.len();
                let _ = self.streams[at].write(&[data, &vec![7; size]].concat());
            }
            (Side::Balloon(balloon), _) => balloon.set_target(u32::from(small)),
            (Side::Custom(custom, _), 0) => {
                let _ = custom.set_space(data.to_vec());
                driver.attached.transport.queues().config_changed();
            }
            // Dropped chains are given back as well.
            (Side::Custom(_, chains), _) => chains.truncate(size % 4),
            _ => {}
        }
    }

    /// Take what the device has sent, and do the program's part.
    pub(crate) fn serve(&mut self, place: &HostFolder, driver: &MockDriver) {
        let mut bytes = [0; 0x4000];
        if let Side::Vsock(_) = self.side {
            while let Some(stream) = place.accept() {
                self.keep(stream);
            }
        }
        for stream in &mut self.streams {
            while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
        }
        match &mut self.side {
            Side::Net(_, socket) => while socket.recv(&mut bytes).is_ok() {},
            Side::Custom(custom, chains) => program(custom, chains, driver),
            _ => {}
        }
    }
}

/// The program keeps every third chain, and answers the others with a part of what it is given.
fn program(custom: &Custom, chains: &mut Vec<Chain>, driver: &MockDriver) {
    let queues = driver.attached.transport.queues();
    custom.serve(queues);
    let _ = custom.take_happened();
    if !custom.catch_up(queues) {
        return;
    }
    for queue in 0..custom.config().queues.len() {
        for turn in 0.. {
            let popped = queues.access().and_then(|access| access.pop(queue));
            let Some(chain) = popped else { break };
            match turn % 3 {
                0 => {
                    let size = usize::try_from(chain.writable_len() / 2).unwrap();
                    custom.complete(queues, chain, vec![9; size.min(0x1_0000)]);
                }
                1 => drop(chain),
                _ => chains.push(chain),
            }
        }
    }
}

/// An image for disks: the corpus's first.
pub(crate) fn image() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/qcow2/plain")).unwrap()
}
