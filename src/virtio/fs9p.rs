//! The 9P transport device (virtio 1.2, 5.1, device type 9): a directory of the host for the guest,
//! by the server of `share/`. Its configuration space has the tag that the guest mounts by. The
//! thread in `fs9p_worker.rs` serves the requests. Any thread.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::EventOps;
use virtio_bindings::virtio_ids::VIRTIO_ID_9P;

use super::device::{Frozen, VirtioDevice, read_space};
use super::fs9p_worker::Shared;
use super::queues::Queues;
use super::worker::Worker;
use crate::bytes::{Reader, bad};
use crate::config::ShareConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::share::{Directory, Options, Server};

/// `VIRTIO_9P_MOUNT_TAG`: the configuration space has a tag.
const MOUNT_TAG: u64 = 1;

/// See the module.
#[derive(Debug)]
pub struct Fs9p {
    shared: Arc<Shared>,
    config: ShareConfig,
    directory: Arc<Directory>,
    worker: Worker,
}

impl Fs9p {
    /// A share of a configuration. The directory is opened.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if a value is bad, or the directory cannot be opened.
    pub fn new(mut config: ShareConfig) -> Result<Self> {
        config.check()?;
        let directory = Arc::new(Directory::open(&config.path, config.options)?);
        // A fork in another process may have another working directory.
        if let Ok(path) = std::path::absolute(&config.path) {
            config.path = path;
        }
        Ok(Self::of(config, directory))
    }

    fn of(config: ShareConfig, directory: Arc<Directory>) -> Self {
        let shared = Arc::new(Shared::new(Server::new(Arc::clone(&directory))));
        Self { shared, config, directory, worker: Worker::default() }
    }

    /// The share of a fork: of the same directory, or of a snapshot from a file the one that is at
    /// its path.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`] if the bytes are not those of `spec`; [`ErrorKind::Config`] if the
    /// directory cannot be opened.
    pub(super) fn restored(name: &str, spec: &[u8], frozen: Option<&Frozen>) -> Result<Self> {
        let config = parse(name, spec)?;
        config.check().map_err(|error| bad(name, error.to_string()))?;
        let frozen = frozen.and_then(|frozen| Arc::clone(frozen).downcast::<Directory>().ok());
        match frozen {
            Some(directory) => Ok(Self::of(config, directory)),
            None => Self::new(config).map_err(|error| {
                error.hint("give the fork a directory: fork(virtio={\"share0\": Share(...)})")
            }),
        }
    }
}

fn parse(name: &str, spec: &[u8]) -> Result<ShareConfig> {
    let mut reader = Reader::new(name, spec);
    let [read_only, has_owner] = reader.take()?;
    let owner = (reader.u32()?, reader.u32()?);
    let length = usize::from(reader.u16()?);
    let tag = String::from_utf8(reader.bytes(length)?.to_vec())
        .map_err(|_| bad(name, "its tag is not text"))?;
    let path = PathBuf::from(std::ffi::OsString::from_vec(reader.rest().to_vec()));
    let options = Options { read_only: read_only != 0, owner: (has_owner != 0).then_some(owner) };
    Ok(ShareConfig { path, tag, options })
}

impl VirtioDevice for Fs9p {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_9P
    }

    fn features(&self) -> u64 {
        MOUNT_TAG
    }

    fn queue_sizes(&self) -> &[u16] {
        // Linux uses chains of at most 128 buffers.
        &[256]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let tag = self.config.tag.as_bytes();
        let length = u16::try_from(tag.len()).unwrap_or(0).to_le_bytes();
        read_space(&[&length[..], tag].concat(), offset, data);
    }

    fn reset(&self) {
        self.shared.reset();
    }

    fn process_queue(&self, queues: &Arc<Queues>, _queue: usize, _ops: &mut EventOps<'_>) {
        let shared = Arc::clone(&self.shared);
        self.worker.start(queues, move || shared.run());
        self.shared.notify(queues);
    }

    fn quiesce(&self) -> Result<()> {
        self.shared.quiesce().map_err(|()| {
            let path = self.config.path.display();
            let detail = format!("a request to {path} does not end");
            Error::new(ErrorKind::State, format!("share {}", self.config.tag), detail)
        })
    }

    fn resume(&self) {
        self.shared.resume();
    }

    fn save(&self) -> Result<Vec<u8>> {
        self.shared.save()
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        self.shared.restore(state)
    }

    fn spec(&self) -> Vec<u8> {
        let ShareConfig { path, tag, options: Options { read_only, owner } } = &self.config;
        let mut bytes = vec![u8::from(*read_only), u8::from(owner.is_some())];
        let (uid, gid) = owner.unwrap_or_default();
        bytes.extend([uid.to_le_bytes(), gid.to_le_bytes()].concat());
        bytes.extend(u16::try_from(tag.len()).unwrap_or(0).to_le_bytes());
        bytes.extend(tag.as_bytes());
        bytes.extend(path.as_os_str().as_bytes());
        bytes
    }

    fn freeze(&self) -> Result<Option<Frozen>> {
        Ok(Some(Arc::clone(&self.directory) as Frozen))
    }

    fn close(&self) {
        // A request that the host's file system holds up is not waited for.
        let is_idle = self.shared.close();
        self.worker.end(is_idle);
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

impl Drop for Fs9p {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/config/virtio.rs.

    use std::path::Path;

    use vmm_sys_util::tempdir::TempDir;

    use super::super::mock::{MockDriver, readable, writable};
    use super::super::registers::STATUS;
    use super::*;

    const AT: u64 = MockDriver::BUFFERS;
    const REPLY: u64 = AT + 0x1000;

    fn config(path: &Path) -> ShareConfig {
        ShareConfig { path: path.into(), tag: "host".into(), options: Options::default() }
    }

    fn folder() -> TempDir {
        TempDir::new_with_prefix(std::env::temp_dir().join("pyvmm-fs9p-")).unwrap()
    }

    /// A request by the queue, and the reply without its size and tag.
    fn ask(driver: &mut MockDriver, kind: u8, body: &[u8]) -> (u8, Vec<u8>) {
        let size = u32::try_from(7 + body.len()).unwrap();
        let message = [&size.to_le_bytes()[..], &[kind, 1, 0], body].concat();
        driver.memory.write(AT, &message).unwrap();
        let buffers = [readable(AT, 5), readable(AT + 5, size - 5), writable(REPLY, 8192)];
        let written = driver.exchange(0, &buffers).unwrap();
        let mut reply = vec![0; usize::try_from(written).unwrap()];
        driver.memory.read(REPLY, &mut reply).unwrap();
        assert_eq!(reply[..4], written.to_le_bytes());
        (reply[4], reply[7..].to_vec())
    }

    fn attach(driver: &mut MockDriver) {
        assert_eq!(driver.start(MOUNT_TAG), 15);
        let version = [&[0, 32, 0, 0, 8, 0][..], b"9P2000.L"].concat();
        assert_eq!(ask(driver, 100, &version), (101, version));
        let root = [&[0; 4][..], &[0xff; 4], &[0; 8]].concat();
        assert_eq!(ask(driver, 104, &root).0, 105);
    }

    #[test]
    fn a_driver_finds_the_tag_and_reads_a_file() {
        let folder = folder();
        std::fs::write(folder.as_path().join("f"), "Hello").unwrap();
        let device = Fs9p::new(config(folder.as_path())).unwrap();
        let mut driver = MockDriver::new(Arc::new(device), 4).unwrap();
        let mut tag = [0; 8];
        driver.config(0, &mut tag);
        assert_eq!(tag, [4, 0, b'h', b'o', b's', b't', 0, 0]);
        driver.write_config(0, &[1; 8]);
        driver.config(3, &mut tag[..2]);
        assert_eq!(tag[..2], *b"os");
        assert_eq!(driver.offered() & 0xff, MOUNT_TAG);
        attach(&mut driver);
        let walk = [&[0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0][..], b"f"].concat();
        assert_eq!(ask(&mut driver, 110, &walk).0, 111);
        assert_eq!(ask(&mut driver, 12, &[1, 0, 0, 0, 0, 0, 0, 0]).0, 13);
        let read = [&[1, 0, 0, 0][..], &[0; 8], &[100, 0, 0, 0]].concat();
        assert_eq!(ask(&mut driver, 116, &read), (117, b"\x05\0\0\0Hello".to_vec()));
        // The driver's reset ends the session.
        attach(&mut driver);
        assert_eq!(ask(&mut driver, 116, &read), (7, libc::EBADF.to_le_bytes().to_vec()));
    }

    #[test]
    fn a_request_without_room_for_a_reply_needs_a_reset() {
        let folder = folder();
        let device = Fs9p::new(config(folder.as_path())).unwrap();
        let mut driver = MockDriver::new(Arc::new(device), 4).unwrap();
        driver.start(0);
        driver.add(0, &[readable(AT, 8), writable(REPLY, 10)]).unwrap();
        driver.notify(0);
        for _ in 0..100 {
            driver.turn(100).unwrap();
            if driver.read(STATUS) == 0x4f {
                break;
            }
        }
        let failure = driver.attached.transport.queues().failure().unwrap();
        assert!(failure.contains("no room"), "{failure}");
        attach(&mut driver);
    }

    #[test]
    fn a_device_like_another_is_made_of_its_spec() {
        let folder = folder();
        let options = Options { read_only: true, owner: Some((1, 2)) };
        let device = Fs9p::new(ShareConfig { options, ..config(folder.as_path()) }).unwrap();
        let frozen = device.freeze().unwrap();
        let again = Fs9p::restored("share0", &device.spec(), None).unwrap();
        assert_eq!(again.config, device.config);
        let spec = device.spec();
        drop(folder);
        let error = Fs9p::restored("share0", &spec, None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Config);
        assert!(error.hint.unwrap().contains("virtio="));
        // A fork of this process has the directory itself.
        Fs9p::restored("share0", &spec, frozen.as_ref()).unwrap();
        assert_eq!(parse("share0", &spec[..5]).unwrap_err().kind, ErrorKind::Snapshot);
    }
}
