//! The transport and the walk, against drivers that do what virtio forbids.

use std::sync::Arc;

use proptest::prelude::*;

use super::Rng;
use super::mock::{MockDriver, readable, writable};
use super::registers::*;
use crate::config::RngConfig;
use crate::devices::Device;

fn rng() -> MockDriver {
    MockDriver::new(Arc::new(Rng::new(RngConfig { seed: Some(7) })), 4).unwrap()
}

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
fn the_event_index_says_which_completions_interrupt() {
    let mut driver = rng();
    driver.start(EVENT_IDX);
    driver.exchange(0, &[writable(AT, 1)]).unwrap();
    assert_eq!(driver.interrupt_status(), USED_BUFFER);
    driver.write(INTERRUPT_ACK, USED_BUFFER);
    // used_event is still 0: the driver has not asked for the second.
    driver.exchange(0, &[writable(AT, 1)]).unwrap();
    assert_eq!(driver.interrupt_status(), 0);
}

/// The device needs a reset, says why, and works again after it.
fn fails(mut driver: MockDriver, reason: &str) {
    driver.notify(0);
    driver.turn(0).unwrap();
    assert_eq!(driver.read(STATUS) & 0x40, 0x40);
    assert_eq!(driver.interrupt_status() & CONFIGURATION_CHANGE, CONFIGURATION_CHANGE);
    let failure = driver.attached.transport.queues().failure().unwrap();
    assert!(failure.contains(reason), "{failure}");
    driver.notify(0);
    driver.turn(0).unwrap();
    assert_eq!(driver.used(0), None);
    assert_eq!(driver.start(0), 15);
    assert_eq!(driver.exchange(0, &[writable(AT, 8)]), Some(8));
}

fn started() -> MockDriver {
    let mut driver = rng();
    driver.start(INDIRECT_DESC);
    driver
}

#[test]
fn a_loop_is_refused() {
    let mut driver = started();
    driver.set_descriptor(0, 0, (AT, 8, 3, 1));
    driver.set_descriptor(0, 1, (AT, 8, 3, 0));
    driver.add_head(0, 0);
    fails(driver, "no end");
}

#[test]
fn a_descriptor_that_does_not_exist_is_refused() {
    let mut driver = started();
    driver.set_descriptor(0, 0, (AT, 8, 3, 60_000));
    driver.add_head(0, 0);
    fails(driver, "no end");
    let mut driver = started();
    driver.add_head(0, 60_000);
    fails(driver, "no end");
}

#[test]
fn a_readable_descriptor_after_a_writable_one_is_refused() {
    let mut driver = started();
    driver.add(0, &[writable(AT, 8), readable(AT, 8)]).unwrap();
    fails(driver, "readable descriptor follows");
}

#[test]
fn buffers_outside_memory_are_refused() {
    for (address, length) in [(1 << 40, 8), (u64::MAX - 3, 8), ((4 << 20) - 4, 8), (AT, u32::MAX)] {
        let mut driver = started();
        driver.add(0, &[writable(address, length)]).unwrap();
        fails(driver, "not in memory");
    }
}

#[test]
fn chains_of_more_than_4_gib_are_refused() {
    let mut driver = started();
    driver.add(0, &[readable(AT, 0x1000), readable(AT, u32::MAX)]).unwrap();
    // The second is outside memory as well; either is a reason.
    driver.notify(0);
    driver.turn(0).unwrap();
    assert_eq!(driver.read(STATUS) & 0x40, 0x40);
}

#[test]
fn an_indirect_table_works_and_one_inside_another_is_refused() {
    let mut driver = started();
    let table: Vec<u8> = [AT.to_le_bytes(), (4u64 | 2 << 32).to_le_bytes()].concat();
    driver.memory.write(AT + 0x100, &table).unwrap();
    driver.set_descriptor(0, 0, (AT + 0x100, 16, 4, 0));
    driver.add_head(0, 0);
    driver.notify(0);
    driver.turn(0).unwrap();
    assert_eq!(driver.used(0), Some((0, 4)));
    let mut driver = started();
    let nested: Vec<u8> = [AT.to_le_bytes(), (16u64 | 4 << 32).to_le_bytes()].concat();
    driver.memory.write(AT + 0x100, &nested).unwrap();
    driver.set_descriptor(0, 0, (AT + 0x100, 16, 4, 0));
    driver.add_head(0, 0);
    fails(driver, "no end");
    let mut driver = started();
    driver.set_descriptor(0, 0, (AT + 0x100, 17, 4, 0));
    driver.add_head(0, 0);
    fails(driver, "no end");
}

#[test]
fn more_entries_than_the_queue_has_are_refused() {
    let driver = started();
    driver.set_available(0, 65);
    fails(driver, "available ring");
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

#[test]
fn a_quiesced_device_does_nothing_and_catches_up() {
    let mut driver = started();
    let transport = Arc::clone(&driver.attached.transport);
    Device::quiesce(&*transport).unwrap();
    driver.add(0, &[writable(AT, 8)]).unwrap();
    driver.notify(0);
    driver.turn(0).unwrap();
    assert_eq!(driver.used(0), None);
    Device::resume(&*transport);
    driver.turn(0).unwrap();
    assert_eq!(driver.used(0).map(|(_, written)| written), Some(8));
}

#[test]
fn a_chain_that_was_taken_is_taken_again_after_a_snapshot() {
    let mut driver = started();
    driver.add(0, &[writable(AT, 8)]).unwrap();
    let queues = Arc::clone(driver.attached.transport.queues());
    let access = queues.access().unwrap();
    let chain = access.pop(0).unwrap();
    drop(access);
    let transport = Arc::clone(&driver.attached.transport);
    Device::quiesce(&*transport).unwrap();
    let state = Device::save(&*transport).unwrap();
    Device::restore(&*transport, &state).unwrap();
    Device::resume(&*transport);
    // What was taken before belongs to another epoch: to complete it does nothing.
    queues.access().unwrap().complete(chain, 3);
    assert_eq!(driver.used(0), None);
    driver.turn(0).unwrap();
    assert_eq!(driver.used(0).map(|(_, written)| written), Some(8));
    assert_eq!(driver.used(0), None, "answered once");
}

#[test]
fn a_dropped_chain_is_given_back_empty() {
    let mut driver = started();
    let head = driver.add(0, &[writable(AT, 8)]).unwrap();
    let queues = Arc::clone(driver.attached.transport.queues());
    drop(queues.access().unwrap().pop(0).unwrap());
    driver.turn(0).unwrap();
    assert_eq!(driver.used(0), Some((head, 0)));
}

proptest! {
    #[test]
    fn no_rings_make_it_panic_or_spin(
        raw in prop::collection::vec((0u64..0x50_0000, 0u32..0x2000, 0u16..8, 0u16..70), 1..64),
        heads in prop::collection::vec(0u16..70, 1..64),
    ) {
        let mut driver = started();
        for (index, raw) in (0..).zip(raw) {
            driver.set_descriptor(0, index, raw);
        }
        heads.iter().for_each(|head| driver.add_head(0, *head));
        driver.notify(0);
        driver.turn(0).unwrap();
        let mut given_back = 0;
        while driver.used(0).is_some() {
            given_back += 1;
        }
        prop_assert!(given_back <= heads.len());
    }

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

    #[test]
    fn a_damaged_state_is_an_error_or_a_state(at in 0usize..200, byte in any::<u8>(), cut in 0usize..200) {
        let mut driver = started();
        driver.add(0, &[writable(AT, 8)]).unwrap();
        let transport = Arc::clone(&driver.attached.transport);
        let mut state = Device::save(&*transport).unwrap();
        if let Some(place) = state.get_mut(at) {
            *place = byte;
        }
        let _ = Device::restore(&*transport, &state);
        state.truncate(cut.min(state.len()));
        let _ = Device::restore(&*transport, &state);
        driver.turn(0).unwrap();
    }
}
