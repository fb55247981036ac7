//! Drivers that break what virtio 1.2 requires of them, by its sections on initialization and
//! queues. `chain.rs` has more that break a descriptor chain. docs/virtio.md says what the device
//! does.

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Rng;
    use super::super::mock::tests::rng;
    use super::super::mock::{MockDriver, readable, writable};
    use super::super::registers::*;
    use crate::config::RngConfig;
    use crate::memory::{Backing, anonymous};

    const AT: u64 = MockDriver::BUFFERS;
    const TABLE: u64 = AT + 0x8000;
    const NEXT: u64 = 1 << 32;
    const WRITE: u64 = 2 << 32;

    fn started(features: u64) -> MockDriver {
        let mut driver = rng();
        assert_eq!(driver.start(features), 15);
        driver
    }

    fn turn(driver: &MockDriver) {
        while driver.turn(0).unwrap() > 0 {}
    }

    fn works(driver: &mut MockDriver) {
        assert_eq!(driver.exchange(0, &[writable(AT, 8)]), Some(8));
    }

    /// The device needs a reset, says why, and works again after it.
    fn needs_reset(mut driver: MockDriver, reason: &str) {
        assert_eq!(driver.read(STATUS), 0x4f);
        let failure = driver.attached.transport.queues().failure().unwrap();
        assert!(failure.contains(reason), "{failure}");
        assert_eq!(driver.start(0), 15);
        works(&mut driver);
    }

    /// An indirect table of buffers of one byte that the device writes, in descriptor 0.
    fn add_table(driver: &mut MockDriver, entries: u16, flags: u16) {
        for index in 0..entries {
            let next = if index + 1 < entries { NEXT | u64::from(index + 1) << 48 } else { 0 };
            let entry = [AT.to_le_bytes(), (1 | WRITE | next).to_le_bytes()].concat();
            driver.memory.write(TABLE + 16 * u64::from(index), &entry).unwrap();
        }
        driver.set_descriptor(0, 0, (TABLE, 16 * u32::from(entries), flags, 1));
        driver.set_descriptor(0, 1, (AT, 8, 2, 0));
        driver.add_head(0, 0);
        driver.notify(0);
        turn(driver);
    }

    /// 2.1.1
    #[test]
    fn a_driver_that_has_failed_goes_on_only_after_a_reset() {
        let mut driver = rng();
        assert_eq!(driver.greet(VERSION_1), 11);
        driver.set_up_queues();
        driver.write(STATUS, 11 | 0x80);
        driver.write(STATUS, 15 | 0x80);
        assert_eq!(driver.read(STATUS), 11 | 0x80);
        assert_eq!(driver.attached.transport.queues().features(), None);
        driver.start(0);
        // Both at once is a failure as well, and one in use ends it.
        driver.greet(VERSION_1);
        driver.write(STATUS, 15 | 0x80);
        assert_eq!(driver.read(STATUS), 11 | 0x80);
        driver.start(0);
        driver.write(STATUS, 0x80);
        assert_eq!(driver.read(STATUS), 15 | 0x80);
        driver.add(0, &[writable(AT, 8)]).unwrap();
        driver.notify(0);
        turn(&driver);
        assert_eq!(driver.used(0), None);
        driver.start(0);
        works(&mut driver);
    }

    /// 2.1.1 and 3.1.1: steps that are left out, or made at once.
    #[test]
    fn steps_of_the_initialization_are_made_in_their_order() {
        let mut driver = rng();
        driver.write(DRIVER_FEATURES_SEL, 1);
        driver.write(DRIVER_FEATURES, 1);
        driver.write(STATUS, 12);
        assert_eq!(driver.read(STATUS), 0, "neither found nor driven");
        driver.write(STATUS, 7);
        assert_eq!(driver.read(STATUS), 3, "no features");
        driver.write(STATUS, 15);
        assert_eq!(driver.read(STATUS), 15);
        // No queue was set up: there is none.
        driver.notify(0);
        turn(&driver);
        assert_eq!(driver.read(STATUS), 15);
        driver.start(0);
        works(&mut driver);
    }

    /// 2.2.1 and 6.1
    #[test]
    fn features_that_were_not_offered_and_none_at_all_are_refused() {
        let ring_packed = 1 << 34;
        for features in [VERSION_1 | 1, VERSION_1 | ring_packed, 0, EVENT_IDX, u64::MAX] {
            let mut driver = rng();
            assert_eq!(driver.greet(features), 3, "{features:#x}");
            driver.write(STATUS, 15);
            assert_eq!(driver.read(STATUS), 3);
            assert_eq!(driver.start(0), 15);
        }
        let mut driver = rng();
        assert_eq!(driver.greet(VERSION_1), 11);
        driver.write(DRIVER_FEATURES_SEL, 0);
        driver.write(DRIVER_FEATURES, u32::MAX);
        driver.set_up_queues();
        driver.write(STATUS, 15);
        assert_eq!(driver.attached.transport.queues().features(), Some(VERSION_1));
    }

    /// 2.5.1 and 4.2.2.2: what is not in the configuration space.
    #[test]
    fn what_no_feature_offers_reads_as_zero() {
        let mut driver = started(0);
        for offset in [0, 0x10, 0xeff] {
            driver.write_config(offset, &[7; 4]);
            let mut data = [9; 8];
            driver.config(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
        works(&mut driver);
    }

    /// 2.7.1
    #[test]
    fn rings_that_are_not_aligned_need_a_reset() {
        for (register, value) in [(QUEUE_DESC_LOW, 8), (QUEUE_DRIVER_LOW, 1), (QUEUE_DEVICE_LOW, 2)]
        {
            let address = 0x2_0000;
            for is_corrected in [false, true] {
                let mut driver = rng();
                driver.greet(VERSION_1);
                driver.set_up_queues();
                driver.write(QUEUE_SEL, 0);
                driver.write(QUEUE_READY, 0);
                driver.write(register, address + value);
                if is_corrected {
                    driver.write(register, address);
                }
                driver.write(QUEUE_READY, 1);
                driver.write(STATUS, 15);
                if is_corrected {
                    assert_eq!(driver.read(STATUS), 15);
                } else {
                    needs_reset(driver, "alignment");
                }
            }
        }
    }

    /// 2.7 and 4.2.2.2
    #[test]
    fn a_size_that_the_queue_cannot_have_needs_a_reset() {
        for size in [0, 3, 128, 0x1_0040, u32::MAX] {
            let mut driver = rng();
            driver.greet(VERSION_1);
            driver.set_up_queues();
            driver.write(QUEUE_SEL, 0);
            driver.write(QUEUE_READY, 0);
            driver.write(QUEUE_NUM, size);
            driver.write(QUEUE_READY, 1);
            driver.write(STATUS, 15);
            needs_reset(driver, "size");
        }
    }

    /// 2.7: what the device writes is in ROM.
    #[test]
    fn nothing_is_written_to_rom() {
        const ROM: u64 = 1 << 30;
        let with_rom = || {
            let driver = rng();
            let rom = Backing { read_only: true, shared: false };
            driver.memory.add(ROM, anonymous(0x4000).unwrap(), rom).unwrap();
            driver
        };
        let mut driver = with_rom();
        driver.start(0);
        assert_eq!(driver.exchange(0, &[readable(ROM, 8), writable(AT, 8)]), Some(8));
        driver.add(0, &[writable(ROM, 8)]).unwrap();
        driver.notify(0);
        turn(&driver);
        needs_reset(driver, "not in memory");
        let mut driver = with_rom();
        driver.greet(VERSION_1);
        driver.set_up_queues();
        driver.write(QUEUE_SEL, 0);
        driver.write(QUEUE_READY, 0);
        driver.write(QUEUE_DEVICE_LOW, u32::try_from(ROM).unwrap());
        driver.write(QUEUE_READY, 1);
        driver.write(STATUS, 15);
        needs_reset(driver, "memory that can be written");
    }

    /// 2.7.5.2
    #[test]
    fn a_chain_of_more_than_4_gib_is_refused() {
        let device = Arc::new(Rng::new(RngConfig { seed: Some(7) }));
        let mut driver = MockDriver::new(device, 128).unwrap();
        driver.start(0);
        let most = [writable(AT, 100 << 20); 64];
        driver.add(0, &most).unwrap();
        driver.notify(0);
        turn(&driver);
        needs_reset(driver, "no end");
    }

    /// 2.7.5.3.1
    #[test]
    fn an_indirect_table_longer_than_the_queue_is_refused() {
        let mut driver = started(INDIRECT_DESC);
        add_table(&mut driver, 64, 4);
        assert_eq!(driver.used(0), Some((0, 64)));
        add_table(&mut driver, 65, 4);
        needs_reset(driver, "longer than the queue");
        let mut driver = started(INDIRECT_DESC);
        driver.set_descriptor(0, 0, (1 << 40, 16, 4, 0));
        driver.add_head(0, 0);
        driver.notify(0);
        turn(&driver);
        needs_reset(driver, "no end");
    }

    /// 2.7.5.3.1
    #[test]
    fn a_table_is_used_without_the_feature_and_ends_its_chain() {
        let mut driver = started(0);
        add_table(&mut driver, 2, 4);
        assert_eq!(driver.used(0), Some((0, 2)));
        add_table(&mut driver, 2, 4 | 1);
        assert_eq!(driver.used(0), Some((0, 2)), "without the descriptor that follows");
        works(&mut driver);
    }

    /// 2.7.6.1
    #[test]
    fn an_index_that_goes_back_needs_a_reset() {
        let mut driver = started(0);
        works(&mut driver);
        works(&mut driver);
        driver.set_available(0, 1);
        driver.notify(0);
        turn(&driver);
        needs_reset(driver, "available ring");
    }

    /// 2.7.13: a driver has no more descriptors than the queue.
    #[test]
    fn more_chains_in_flight_than_descriptors_need_a_reset() {
        let mut driver = started(0);
        let queues = Arc::clone(driver.attached.transport.queues());
        driver.set_descriptor(0, 0, (AT, 8, 2, 0));
        let access = queues.access().unwrap();
        let mut held = Vec::new();
        for _ in 0..64 {
            driver.add_head(0, 0);
            held.push(access.pop(0).unwrap());
        }
        // Given back untouched, they count as well.
        held.drain(..).for_each(|chain| access.push_back(chain));
        driver.add_head(0, 0);
        held.extend(std::iter::from_fn(|| access.pop(0)));
        assert_eq!(held.len(), 64);
        drop((held, access));
        needs_reset(driver, "available ring");
    }

    /// 2.7.13: the same descriptors in two chains.
    #[test]
    fn a_head_that_is_available_twice_is_given_back_twice() {
        let mut driver = started(0);
        driver.set_descriptor(0, 0, (AT, 8, 2, 0));
        driver.add_head(0, 0);
        driver.add_head(0, 0);
        driver.notify(0);
        turn(&driver);
        let used: Vec<_> = std::iter::from_fn(|| driver.used(0)).collect();
        assert_eq!(used, [(0, 8), (0, 8)]);
    }

    /// 2.7.7.1
    #[test]
    fn only_the_lowest_flag_of_the_available_ring_counts() {
        let interrupts = |features: u64, flags: u16| {
            let mut driver = started(features);
            let (available, _) = driver.rings(0).unwrap();
            driver.memory.store(available, flags).unwrap();
            works(&mut driver);
            driver.interrupt_status() & USED_BUFFER != 0
        };
        assert!(interrupts(0, 0xfffe) && !interrupts(0, 0xffff));
        assert!(interrupts(EVENT_IDX, 0xffff), "none counts with the event index");
    }

    /// 2.7.10.1
    #[test]
    fn without_a_notification_a_chain_waits_for_the_next_one() {
        let mut driver = rng();
        driver.greet(VERSION_1);
        driver.set_up_queues();
        // It has to be zero at first.
        let (_, used) = driver.rings(0).unwrap();
        driver.memory.store(used, 1u16).unwrap();
        driver.write(STATUS, 15);
        turn(&driver);
        assert!(driver.wants_notification(0));
        driver.add(0, &[writable(AT, 8)]).unwrap();
        turn(&driver);
        assert_eq!(driver.used(0), None);
        driver.add(0, &[writable(AT, 9)]).unwrap();
        driver.notify(0);
        turn(&driver);
        assert_eq!([driver.used(0), driver.used(0)].map(|used| used.unwrap().1), [8, 9]);
        driver.notify(0);
        turn(&driver);
        assert_eq!((driver.used(0), driver.read(STATUS)), (None, 15));
    }

    /// 3.1.1
    #[test]
    fn a_notification_before_the_start_takes_nothing() {
        let mut driver = rng();
        driver.greet(VERSION_1);
        driver.set_up_queues();
        driver.add(0, &[writable(AT, 8)]).unwrap();
        driver.notify(0);
        turn(&driver);
        assert_eq!((driver.used(0), driver.interrupt_status()), (None, 0));
        driver.write(STATUS, 15);
        turn(&driver);
        assert_eq!(driver.used(0).map(|(_, written)| written), Some(8));
    }

    /// 3.3.1: buffers of a queue in use.
    #[test]
    fn a_descriptor_that_changes_later_is_used_as_it_was() {
        let mut driver = started(0);
        let head = driver.add(0, &[writable(AT, 8)]).unwrap();
        let queues = Arc::clone(driver.attached.transport.queues());
        let access = queues.access().unwrap();
        let chain = access.pop(0).unwrap();
        driver.set_descriptor(0, head, (1 << 40, u32::MAX, 3, head));
        assert_eq!((chain.writable()[0].address, chain.writable()[0].length), (AT, 8));
        access.complete(chain, 8);
        drop(access);
        assert_eq!(driver.used(0), Some((head, 8)));
    }
}
