//! The transport of a device over MMIO (virtio 1.2, 4.2): its registers, without the legacy
//! interface. vCPU threads access them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;

use super::device::VirtioDevice;
use super::doorbells::Doorbells;
use super::queues::Queues;
use super::registers::*;
use crate::sync::{Mutex, rank};

/// What the driver has written, and what selects the registers.
#[derive(Debug, Default)]
pub(super) struct Registers {
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) queue_sel: u32,
    pub(super) driver_features: u64,
    /// A vCPU is resetting the device: nothing else is accepted.
    pub(super) is_resetting: bool,
}

/// A device on the MMIO bus.
#[derive(Debug)]
pub struct Transport {
    device: Arc<dyn VirtioDevice>,
    queues: Arc<Queues>,
    pub(super) registers: Mutex<Registers, rank::VirtioRegisters>,
    doorbells: Doorbells,
}

impl Transport {
    pub(super) fn new(
        device: Arc<dyn VirtioDevice>,
        queues: Arc<Queues>,
        doorbells: Doorbells,
    ) -> Self {
        Self { device, queues, registers: Mutex::default(), doorbells }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// The device, if it is of this kind.
    #[must_use]
    pub fn device_as<T: VirtioDevice + 'static>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.device).as_any().downcast().ok()
    }

    /// Its queues.
    #[must_use]
    pub fn queues(&self) -> &Arc<Queues> {
        &self.queues
    }

    /// The feature bits that are offered to the driver.
    #[must_use]
    pub fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// Whether a driver may accept just these features.
    pub(super) fn accepts(&self, features: u64) -> bool {
        features & !self.offered() == 0
            && features & VERSION_1 != 0
            && self.device.accepts(features)
    }

    /// The status that the driver sees.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.queues.status.load(Ordering::Acquire)
    }

    pub(super) fn register(&self, at: u64) -> u32 {
        let registers = self.registers.lock();
        let half = |value: u64, select: u32| match select {
            0 => low(value),
            1 => low(value >> 32),
            _ => 0,
        };
        match at {
            MAGIC_VALUE => MAGIC,
            VERSION_NUMBER => VERSION,
            DEVICE_ID => self.device.device_type(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.offered(), registers.device_features_sel),
            QUEUE_NUM_MAX => {
                self.with_queue(registers.queue_sel, |queue| u32::from(queue.ring.max_size()))
            }
            QUEUE_READY => {
                self.with_queue(registers.queue_sel, |queue| u32::from(queue.ring.ready()))
            }
            INTERRUPT_STATUS => self.queues.interrupt_status.load(Ordering::Acquire),
            STATUS => u32::from(self.status()),
            // There are no shared memory regions.
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            // Acquire: pairs with the release that counts a change.
            CONFIG_GENERATION => self.queues.config_generation.load(Ordering::Acquire),
            _ => 0,
        }
    }

    fn with_queue(&self, select: u32, f: impl FnOnce(&mut super::queue::Queue) -> u32) -> u32 {
        let queue = usize::try_from(select).ok().and_then(|at| self.queues.all.get(at));
        queue.map_or(0, |queue| f(&mut queue.lock()))
    }

    pub(super) fn write_register(&self, at: u64, value: u32) {
        match at {
            QUEUE_NOTIFY => return self.notify(value),
            STATUS => return self.write_status(value),
            INTERRUPT_ACK => {
                self.queues.interrupt_status.fetch_and(!value, Ordering::AcqRel);
                return;
            }
            _ => {}
        }
        let mut registers = self.registers.lock();
        if registers.is_resetting {
            return;
        }
        match at {
            DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            QUEUE_SEL => registers.queue_sel = value,
            DRIVER_FEATURES => self.write_features(&mut registers, value),
            QUEUE_READY => {
                let queue = registers.queue_sel;
                drop(registers);
                self.write_ready(queue, value);
            }
            _ => {
                let queue = registers.queue_sel;
                self.with_queue(queue, |queue| set_up(queue, at, value));
            }
        }
    }

    /// Features are negotiated before FEATURES_OK.
    fn write_features(&self, registers: &mut Registers, value: u32) {
        if self.status() & status::FEATURES_OK != 0 {
            return;
        }
        let (mask, shift) = match registers.driver_features_sel {
            0 => (0xffff_ffff, 0),
            1 => (0xffff_ffff << 32, 32),
            _ => return,
        };
        registers.driver_features = registers.driver_features & !mask | u64::from(value) << shift;
    }

    /// A queue can be stopped alone, and started only before the device. Once the driver has
    /// stopped it, the device does not access it: a stop waits for accesses in progress.
    fn write_ready(&self, select: u32, value: u32) {
        let is_active = self.status() & status::DRIVER_OK != 0;
        if value & 1 == 0 {
            self.queues.stop_queue(select);
        } else if !is_active {
            self.with_queue(select, |queue| {
                queue.ring.set_ready(true);
                0
            });
        }
    }

    /// A notification without an ioeventfd.
    fn notify(&self, queue: u32) {
        let Ok(queue) = usize::try_from(queue) else { return };
        self.queues.notify(queue);
        if let Some(event) = self.queues.notify.get(queue) {
            self.doorbells.rung(queue, event);
        }
    }

    fn write_status(&self, value: u32) {
        // The upper bits are reserved.
        let wanted = low_byte(value) & status::OF_DRIVER;
        if value & 0xff == 0 {
            return self.reset();
        }
        let registers = self.registers.lock();
        if registers.is_resetting {
            return;
        }
        let now = self.status();
        // A driver that has given up resets the device before it begins again.
        if now & status::FAILED != 0 {
            return;
        }
        // Bits can only be set.
        let mut set = wanted & !now;
        let has = |bit| (now | set) & bit != 0;
        let is_greeted = has(status::ACKNOWLEDGE) && has(status::DRIVER);
        let features = registers.driver_features;
        if !(is_greeted && self.accepts(features)) {
            set &= !status::FEATURES_OK;
        }
        if (now | set) & status::FEATURES_OK == 0 || set & status::FAILED != 0 {
            set &= !status::DRIVER_OK;
        }
        drop(registers);
        self.queues.status.fetch_or(set, Ordering::AcqRel);
        if set & status::DRIVER_OK != 0 {
            self.activate(features);
        }
        if set & status::FAILED != 0 {
            self.queues.stop();
        }
    }

    /// The driver has started the device.
    fn activate(&self, features: u64) {
        for queue in &self.queues.all {
            queue.lock().ring.set_event_idx(features & EVENT_IDX != 0);
        }
        self.queues.start(features);
        if !self.queues.are_valid() {
            self.queues.fail(
                "a queue has a size or an alignment that is not allowed, or rings that are not in \
                 memory that can be written",
            );
            return;
        }
        self.device.activate(&self.queues, features);
        self.queues.notify_all();
    }

    /// The driver resets the device. It reads a status of zero once this is done.
    pub(super) fn reset(&self) {
        {
            let mut registers = self.registers.lock();
            if std::mem::replace(&mut registers.is_resetting, true) {
                return;
            }
        }
        // With no lock held: it waits for the device.
        self.queues.stop();
        self.device.reset();
        self.queues.all.iter().for_each(|queue| queue.lock().reset());
        self.queues.interrupt_status.store(0, Ordering::Release);
        let mut registers = self.registers.lock();
        *registers = Registers::default();
        self.queues.status.store(0, Ordering::Release);
    }
}

/// Set up a queue, before it is started. The values that it cannot have are noted: a device with
/// such a queue needs a reset.
fn set_up(queue: &mut super::queue::Queue, at: u64, value: u32) -> u32 {
    let ring = &mut queue.ring;
    if ring.ready() {
        return 0;
    }
    let is_allowed = match at {
        QUEUE_NUM => {
            u16::try_from(value).is_ok_and(|size| size.is_power_of_two() && size <= ring.max_size())
        }
        QUEUE_DESC_LOW => value.is_multiple_of(16),
        QUEUE_DRIVER_LOW => value.is_multiple_of(2),
        QUEUE_DEVICE_LOW => value.is_multiple_of(4),
        _ => true,
    };
    if !is_allowed {
        queue.refused.insert(at);
        return 0;
    }
    queue.refused.remove(&at);
    let (lower, upper) = (Some(value), None);
    match at {
        QUEUE_NUM => ring.set_size(u16::try_from(value).unwrap_or(0)),
        QUEUE_DESC_LOW => ring.set_desc_table_address(lower, upper),
        QUEUE_DESC_HIGH => ring.set_desc_table_address(upper, lower),
        QUEUE_DRIVER_LOW => ring.set_avail_ring_address(lower, upper),
        QUEUE_DRIVER_HIGH => ring.set_avail_ring_address(upper, lower),
        QUEUE_DEVICE_LOW => ring.set_used_ring_address(lower, upper),
        QUEUE_DEVICE_HIGH => ring.set_used_ring_address(upper, lower),
        _ => {}
    }
    0
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or_default()
}

fn low_byte(value: u32) -> u8 {
    u8::try_from(value & 0xff).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    //! Covers src/virtio/registers.rs, src/virtio/device.rs, src/virtio/subscriber.rs.
    //! Covers src/virtio/attach.rs.

    use proptest::prelude::*;

    use super::super::mock::tests::rng;
    use super::super::mock::{MockDriver, writable};
    use super::*;

    use crate::devices::Device as _;

    const AT: u64 = MockDriver::BUFFERS;

    #[test]
    fn a_driver_finds_the_device_and_gets_its_bytes() {
        let mut driver = rng();
        assert_eq!(driver.read(MAGIC_VALUE), MAGIC);
        assert_eq!((driver.read(VERSION_NUMBER), driver.read(DEVICE_ID)), (2, 4));
        assert_eq!(driver.offered(), TRANSPORT_FEATURES);
        assert_eq!(driver.start(0), 15);
        let written = driver.exchange(0, &[writable(AT, 10), writable(AT + 0x1000, 20)]).unwrap();
        assert_eq!(written, 30);
        let mut bytes = [0; 10];
        driver.memory.read(AT, &mut bytes).unwrap();
        assert_ne!(bytes, [0; 10]);
        assert_eq!(driver.interrupt_status(), USED_BUFFER);
        driver.write(INTERRUPT_ACK, USED_BUFFER);
        assert_eq!(driver.interrupt_status(), 0);
        let mut again = rng();
        again.start(0);
        again.exchange(0, &[writable(AT, 10)]).unwrap();
        let mut same = [0; 10];
        again.memory.read(AT, &mut same).unwrap();
        assert_eq!(same, bytes, "the seed decides");
    }

    #[test]
    fn features_are_accepted_only_if_they_were_offered() {
        let mut driver = rng();
        let _ = driver.start(1 << 5);
        assert_eq!(driver.read(STATUS) & 0xc, 0, "neither FEATURES_OK nor DRIVER_OK");
        assert_eq!(driver.start(EVENT_IDX), 15);
        driver.write(DRIVER_FEATURES_SEL, 0);
        driver.write(DRIVER_FEATURES, 0);
        driver.write(STATUS, 1);
        assert_eq!(driver.read(STATUS), 15, "bits are cleared by a reset only");
        assert_eq!(driver.attached.transport.queues().features(), Some(VERSION_1 | EVENT_IDX));
        driver.write(STATUS, 0);
        assert_eq!((driver.read(STATUS), driver.read(QUEUE_READY)), (0, 0));
    }

    #[test]
    fn rings_outside_memory_are_refused_at_the_start() {
        let mut driver = rng();
        driver.start(0);
        driver.write(STATUS, 0);
        for value in [1, 3] {
            driver.write(STATUS, value);
        }
        driver.write(DRIVER_FEATURES_SEL, 1);
        driver.write(DRIVER_FEATURES, 1);
        driver.write(STATUS, 11);
        driver.write(QUEUE_SEL, 0);
        driver.write(QUEUE_DEVICE_HIGH, 0x100);
        driver.write(QUEUE_READY, 1);
        driver.write(STATUS, 15);
        assert_eq!(driver.read(STATUS), 0x4f);
        assert_eq!(driver.attached.transport.queues().features(), Some(VERSION_1));
    }

    proptest! {
        #[test]
        fn no_register_access_makes_it_panic(
            accesses in prop::collection::vec((0u64..0x140, any::<u32>(), 0usize..9, any::<bool>()), 0..200),
        ) {
            let driver = rng();
            for (offset, value, size, is_write) in accesses {
                if is_write {
                    let bytes = u64::from(value).to_le_bytes();
                    driver.attached.transport.write(offset, &bytes[..size.min(8)]);
                } else {
                    driver.attached.transport.read(offset, &mut [0; 8][..size.min(8)]);
                }
            }
            driver.turn(0).unwrap();
        }
    }
}
