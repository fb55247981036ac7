//! Drivers that break what virtio 1.2 requires of them, by its section on registers.
//! docs/virtio.md says what the device does.

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::mock::tests::rng;
    use super::super::mock::{MockDriver, writable};
    use super::super::registers::*;

    use crate::devices::Device;

    const AT: u64 = MockDriver::BUFFERS;

    fn started() -> MockDriver {
        let mut driver = rng();
        assert_eq!(driver.start(0), 15);
        driver
    }

    fn works(driver: &mut MockDriver) {
        assert_eq!(driver.exchange(0, &[writable(AT, 8)]), Some(8));
    }

    /// 4.2.2.2
    #[test]
    fn a_queue_that_does_not_exist_is_not_stopped_nor_is_another() {
        let mut driver = started();
        for queue in [1, 64, u32::MAX] {
            driver.write(QUEUE_SEL, queue);
            driver.write(QUEUE_READY, 0);
            works(&mut driver);
        }
    }

    /// 4.2.2.2
    #[test]
    fn registers_are_accessed_as_they_are_or_not_at_all() {
        let mut driver = started();
        let written_only = [DEVICE_FEATURES_SEL, DRIVER_FEATURES, QUEUE_SEL, QUEUE_NUM];
        let unknown = [0x18, 0x28, 0x3c, 0x40, 0x4c, 0x54, 0x74, 0xc0, 0xf8];
        for offset in written_only.into_iter().chain([QUEUE_NOTIFY, INTERRUPT_ACK]).chain(unknown) {
            assert_eq!(driver.read(offset), 0, "{offset:#x}");
        }
        let read_only = [MAGIC_VALUE, VERSION_NUMBER, DEVICE_ID, QUEUE_NUM_MAX, CONFIG_GENERATION];
        let before = read_only.map(|offset| driver.read(offset));
        for offset in read_only.into_iter().chain([INTERRUPT_STATUS, SHM_LEN_LOW]).chain(unknown) {
            driver.write(offset, u32::MAX);
        }
        assert_eq!(read_only.map(|offset| driver.read(offset)), before);
        assert_eq!((driver.read(SHM_LEN_LOW), driver.read(SHM_BASE_HIGH)), (u32::MAX, u32::MAX));
        let transport = Arc::clone(&driver.attached.transport);
        for (offset, size) in
            [(STATUS, 1), (STATUS, 2), (STATUS, 8), (STATUS + 1, 4), (STATUS - 2, 4)]
        {
            let mut data = [0; 8];
            transport.write(offset, &data[..size]);
            data.fill(9);
            transport.read(offset, &mut data[..size]);
            assert_eq!(data[..size], [0; 8][..size], "{offset:#x}");
        }
        assert_eq!(driver.read(STATUS), 15, "no access of another width resets it");
        works(&mut driver);
    }

    /// 4.2.2.2
    #[test]
    fn selectors_of_nothing_select_nothing() {
        let mut driver = rng();
        for half in [2, u32::MAX] {
            driver.write(DEVICE_FEATURES_SEL, half);
            assert_eq!(driver.read(DEVICE_FEATURES), 0);
            driver.write(DRIVER_FEATURES_SEL, half);
            driver.write(DRIVER_FEATURES, u32::MAX);
        }
        for queue in [1, u32::MAX] {
            driver.write(QUEUE_SEL, queue);
            driver.write(QUEUE_NUM, 8);
            driver.write(QUEUE_READY, 1);
            assert_eq!((driver.read(QUEUE_NUM_MAX), driver.read(QUEUE_READY)), (0, 0));
        }
        assert_eq!(driver.start(0), 15);
        for queue in [1, 0x1_0000, u32::MAX] {
            driver.notify(queue);
        }
        assert_eq!(driver.turn(0).unwrap(), 1, "for the start only");
        works(&mut driver);
        // Undefined bits are not acknowledged, and those of other events stay.
        driver.write(INTERRUPT_ACK, !USED_BUFFER);
        assert_eq!(driver.interrupt_status(), USED_BUFFER);
    }

    /// 4.2.2.2
    #[test]
    fn a_queue_that_is_ready_does_not_change() {
        let mut driver = started();
        driver.write(QUEUE_SEL, 0);
        for register in [
            QUEUE_NUM,
            QUEUE_DESC_LOW,
            QUEUE_DESC_HIGH,
            QUEUE_DRIVER_LOW,
            QUEUE_DRIVER_HIGH,
            QUEUE_DEVICE_LOW,
            QUEUE_DEVICE_HIGH,
        ] {
            driver.write(register, 1);
        }
        works(&mut driver);
    }

    /// 4.2.2.2: a queue that is stopped while the device has a chain of it.
    #[test]
    fn a_queue_that_was_stopped_is_not_accessed() {
        let mut driver = started();
        let queues = Arc::clone(driver.attached.transport.queues());
        driver.add(0, &[writable(AT, 8)]).unwrap();
        let chain = queues.access().unwrap().pop(0).unwrap();
        driver.add(0, &[writable(AT, 8)]).unwrap();
        driver.write(QUEUE_SEL, 0);
        driver.write(QUEUE_READY, 0);
        assert_eq!(driver.read(QUEUE_READY), 0);
        driver.notify(0);
        while driver.turn(0).unwrap() > 0 {}
        let access = queues.access().unwrap();
        access.complete(chain, 8);
        assert!(access.is_empty(0) && access.pop(0).is_none());
        drop(access);
        driver.write(QUEUE_READY, 1);
        assert_eq!(driver.read(QUEUE_READY), 0, "only a reset brings it back");
        assert_eq!((driver.used(0), driver.interrupt_status()), (None, 0));
        driver.start(0);
        works(&mut driver);
    }
}
