//! The block device (virtio 1.2, 5.2): its features, its configuration space, and its life. The
//! thread in `blk_worker.rs` carries out the requests. Any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use event_manager::EventOps;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::blk_config::{self, QUEUE_SIZE, WRITE_BACK};
use super::blk_limit::Limiter;
use super::blk_worker::{DiskCounts, Shared};
use super::device::{Frozen, VirtioDevice, read_space};
use super::queues::Queues;
use super::worker::Worker;
use crate::bytes::{Reader, bad};
use crate::config::{DiskConfig, RateLimits};
use crate::disk::{self, Disk};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

/// See the module.
#[derive(Debug)]
pub struct Blk {
    shared: Arc<Shared>,
    block_size: u32,
    limits: RateLimits,
    /// Whether the driver has accepted to choose the cache mode.
    chooses_cache: AtomicBool,
    /// What a snapshot had: the size, and whether writes are cached.
    restored: Mutex<Option<(u64, bool)>, rank::VirtioDevice>,
    worker: Worker,
}

impl Blk {
    /// A disk of a configuration. Files are opened.
    ///
    /// # Errors
    /// As for [`disk::open`].
    pub fn new(config: DiskConfig) -> Result<Self> {
        config.check()?;
        let DiskConfig { contents, layer, read_only, serial, block_size, limits } = config;
        let disk = disk::open(contents, &layer, read_only)?;
        let mut padded = [0; 20];
        padded.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self::of(disk, padded, block_size, limits))
    }

    fn of(disk: Disk, serial: [u8; 20], block_size: u32, limits: RateLimits) -> Self {
        Self {
            shared: Arc::new(Shared::new(disk, serial)),
            block_size,
            limits,
            chooses_cache: AtomicBool::new(false),
            restored: Mutex::default(),
            worker: Worker::default(),
        }
    }

    /// The disk of a fork.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`] if the bytes are not those of `spec`; [`ErrorKind::Config`] if
    /// nothing is frozen, as in a snapshot from a file.
    pub(super) fn restored(name: &str, spec: &[u8], frozen: Option<&Frozen>) -> Result<Self> {
        let mut reader = Reader::new(name, spec);
        let [read_only] = reader.take()?;
        let block_size = reader.u32()?;
        let rate = |number: u64| Some(number).filter(|number| *number > 0);
        let limits = RateLimits { bytes: rate(reader.u64()?), operations: rate(reader.u64()?) };
        let serial = reader.take()?;
        reader.end()?;
        if !matches!(block_size, 512 | 1024 | 2048 | 4096) {
            return Err(bad(name, format!("blocks of {block_size} bytes")));
        }
        let frozen = frozen.and_then(|frozen| Arc::clone(frozen).downcast().ok());
        let frozen: Arc<disk::Frozen> = frozen.ok_or_else(|| {
            let detail = "a snapshot's file does not have the contents of a disk";
            Error::new(ErrorKind::Config, name, detail)
                .hint("give the fork a disk: fork(virtio={\"disk0\": Disk(...)})")
        })?;
        let disk = Disk::fork(&frozen, read_only != 0);
        let disk = disk.map_err(|error| Error::os(ErrorKind::Io, name, &error))?;
        Ok(Self::of(disk, serial, block_size, limits))
    }

    /// What the disk has done.
    #[must_use]
    pub fn counts(&self) -> &DiskCounts {
        &self.shared.counts
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.shared.disk
    }

    /// The serial number, filled up with zeroes.
    #[must_use]
    pub fn serial(&self) -> &[u8; 20] {
        &self.shared.serial
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        blk_config::features(&self.shared.disk)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let is_write_back = self.shared.is_write_back.load(Ordering::Acquire);
        let space = blk_config::space(&self.shared.disk, self.block_size, is_write_back);
        read_space(&space, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (WRITE_BACK, [value], true) =
            (offset, data, self.chooses_cache.load(Ordering::Acquire))
        {
            self.shared.is_write_back.store(*value & 1 != 0, Ordering::Release);
        }
    }

    fn activate(&self, _queues: &Arc<Queues>, features: u64) {
        let has = |bit: u32| features & 1 << bit != 0;
        self.chooses_cache.store(has(VIRTIO_BLK_F_CONFIG_WCE), Ordering::Release);
        self.shared.is_write_back.store(has(VIRTIO_BLK_F_FLUSH), Ordering::Release);
    }

    fn reactivate(&self, queues: &Arc<Queues>, features: u64) {
        self.activate(queues, features);
        let Some((size, is_cached)) = self.restored.lock().take() else { return };
        self.shared.is_write_back.store(is_cached, Ordering::Release);
        if size != self.shared.disk.size() {
            queues.config_changed();
        }
    }

    fn reset(&self) {
        self.shared.reset();
        self.chooses_cache.store(false, Ordering::Release);
        *self.restored.lock() = None;
    }

    fn process_queue(&self, queues: &Arc<Queues>, _queue: usize, _ops: &mut EventOps<'_>) {
        let (shared, limits) = (Arc::clone(&self.shared), self.limits);
        self.worker.start(queues, move || shared.run(Limiter::new(limits, Instant::now())));
        self.shared.notify(queues);
    }

    fn save(&self) -> Result<Vec<u8>> {
        let mut bytes = self.shared.disk.size().to_le_bytes().to_vec();
        bytes.push(u8::from(self.shared.is_write_back.load(Ordering::Acquire)));
        Ok(bytes)
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = Reader::new("disk", state);
        let size = reader.u64()?;
        let [is_cached] = reader.take()?;
        reader.end()?;
        *self.restored.lock() = Some((size, is_cached != 0));
        Ok(())
    }

    fn spec(&self) -> Vec<u8> {
        let RateLimits { bytes, operations } = self.limits;
        let mut spec = vec![u8::from(self.shared.disk.is_read_only())];
        spec.extend(self.block_size.to_le_bytes());
        spec.extend(bytes.unwrap_or(0).to_le_bytes());
        spec.extend(operations.unwrap_or(0).to_le_bytes());
        spec.extend(self.shared.serial);
        spec
    }

    fn freeze(&self) -> Result<Option<Frozen>> {
        Ok(Some(self.shared.disk.freeze()))
    }

    fn thaw(&self, frozen: &Frozen) -> Result<()> {
        match Arc::clone(frozen).downcast::<disk::Frozen>() {
            Ok(frozen) => self.shared.disk.thaw(&frozen),
            Err(_) => Err(bad("disk", "the snapshot has another device there")),
        }
    }

    fn close(&self) {
        self.shared.close();
        // The program's code is not waited for; its thread ends when it returns.
        self.worker.end(!self.shared.disk.may_block());
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }

    fn forget_counts(&self) {
        self.shared.forget_counts();
    }

    fn failure(&self) -> Option<String> {
        self.shared.failure()
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
pub(super) mod tests {
    //! Covers src/virtio/blk_worker.rs.

    use super::super::mock::{Buffer, MockDriver, readable, writable};
    use super::*;
    use crate::disk::Contents;
    use proptest::prelude::*;

    const AT: u64 = MockDriver::BUFFERS;

    pub(in super::super) fn driver(
        contents: Contents,
        change: impl FnOnce(&mut DiskConfig),
    ) -> MockDriver {
        let mut config = DiskConfig::new(contents);
        change(&mut config);
        MockDriver::new(Arc::new(Blk::new(config).unwrap()), 8).unwrap()
    }

    fn in_memory() -> MockDriver {
        driver(Contents::Bytes(vec![7; 1 << 20]), |config| config.serial = "abc".into())
    }

    pub(in super::super) fn header(driver: &MockDriver, kind: u32, sector: u64) -> Buffer {
        driver.memory.write(AT, &[kind.to_le_bytes(), [0; 4]].concat()).unwrap();
        driver.memory.write(AT + 8, &sector.to_le_bytes()).unwrap();
        driver.memory.fill(AT + 0x100, 1, 0xff).unwrap();
        readable(AT, 16)
    }

    #[test]
    fn a_copy_made_before_the_driver_starts_has_the_cache_that_the_driver_accepts() {
        use super::super::registers::{STATUS, VERSION_1};
        use crate::devices::Device;
        let mut driver = in_memory();
        let transport = Arc::clone(&driver.attached.transport);
        // Without FLUSH: a write survives the host's end.
        driver.greet(VERSION_1);
        let state = Device::save(&*transport).unwrap();
        Device::restore(&*transport, &state).unwrap();
        driver.set_up_queues();
        driver.write(STATUS, 15);
        let mut writeback = [9];
        driver.config(WRITE_BACK, &mut writeback);
        assert_eq!((driver.read(STATUS), writeback), (15, [0]));
    }

    /// Returns the status.
    pub(in super::super) fn request(
        driver: &mut MockDriver,
        kind: u32,
        sector: u64,
        data: &[Buffer],
    ) -> u8 {
        let all = [&[header(driver, kind, sector)], data, &[writable(AT + 0x100, 1)]].concat();
        let written = driver.exchange(0, &all).unwrap();
        assert!(written > 0);
        driver.memory.load(AT + 0x100).unwrap()
    }

    fn bytes(driver: &MockDriver, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        driver.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_disk_is_written_read_and_named() {
        let mut driver = in_memory();
        let features = driver.attached.transport.device().features();
        assert_eq!(driver.start(features), 15);
        let mut size = [0; 8];
        driver.config(0, &mut size);
        assert_eq!(u64::from_le_bytes(size), 2048);
        let (one, two) = (AT + 0x1000, AT + 0x3000);
        driver.memory.fill(one, 1024, 9).unwrap();
        assert_eq!(request(&mut driver, 1, 3, &[readable(one, 1000), readable(one, 24)]), 0);
        assert_eq!(request(&mut driver, 0, 2, &[writable(two, 511), writable(two + 511, 1537)]), 0);
        let expected = [[7; 512].as_slice(), &[9; 1024], &[7; 512]].concat();
        assert_eq!(bytes(&driver, two, 2048), expected);
        assert_eq!(request(&mut driver, 8, 0, &[writable(two, 20)]), 0);
        assert_eq!(bytes(&driver, two, 4), *b"abc\0");
        assert_eq!(request(&mut driver, 4, 0, &[]), 0);
        driver.memory.write(one, &[4u64.to_le_bytes(), 1u64.to_le_bytes()].concat()).unwrap();
        assert_eq!(request(&mut driver, 13, 0, &[readable(one, 16)]), 0);
        assert_eq!(request(&mut driver, 0, 3, &[writable(two, 1024)]), 0);
        assert_eq!(bytes(&driver, two, 1024), [[9; 512], [0; 512]].concat());
    }

    #[test]
    fn bad_requests_have_their_status_and_the_user_learns_why() {
        let mut driver = in_memory();
        driver.start(0);
        let data = AT + 0x1000;
        assert_eq!(request(&mut driver, 0, 2047, &[writable(data, 1024)]), 1);
        let failure = driver.attached.transport.device().failure().unwrap();
        assert!(failure.starts_with("read of 1024 bytes at 1048064: "), "{failure}");
        assert_eq!(request(&mut driver, 1, u64::MAX / 512, &[readable(data, 512)]), 1);
        assert_eq!(request(&mut driver, 0, 0, &[writable(data, 100)]), 1);
        assert_eq!(request(&mut driver, 77, 0, &[]), 2);
        assert_eq!(request(&mut driver, 11, 0, &[readable(data, 15)]), 1);
        assert_eq!(request(&mut driver, 0, 0, &[writable(data, 512)]), 0);
        driver.add(0, &[readable(AT, 8)]).unwrap();
        driver.notify(0);
        for _ in 0..100 {
            driver.turn(10).unwrap();
            if driver.read(super::super::registers::STATUS) & 0x40 != 0 {
                return;
            }
        }
        panic!("a request without a status needs a reset");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn no_request_makes_it_panic_or_stop(
            requests in prop::collection::vec(
                (0u32..15, any::<u64>(), 0u32..4000, any::<bool>(), any::<[u8; 32]>()), 1..20),
        ) {
            let mut driver = in_memory();
            driver.start(0);
            for (kind, sector, length, is_read, data) in requests {
                let sector = if is_read { sector % 3000 } else { sector };
                let at = AT + 0x1000;
                driver.memory.write(at, &data).unwrap();
                let data = if is_read { writable(at, length) } else { readable(at, length) };
                let status = request(&mut driver, kind, sector, &[data]);
                prop_assert!(status <= 2);
            }
        }
    }
}
