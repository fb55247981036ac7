//! The state of a transport and its queues in a snapshot. Parsed from untrusted bytes.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue as Ring, QueueState};

use super::queue::{Queue, Taken};
use super::registers::status;
use super::state_chains;
use super::transport::{Registers, Transport};
use crate::bytes::{Reader, bad};
use crate::error::Result;
use crate::memory::GuestMemory;

/// Where the reasons of interrupts that are still to be raised begin, beside the register.
const DEFERRED: u32 = 8;

pub(super) fn save(transport: &Transport) -> Result<Vec<u8>> {
    let queues = transport.queues();
    // First: what changes meanwhile, and is in here, is also among the deferred interrupts below.
    let own = transport.device().save()?;
    let mut bytes = Vec::new();
    bytes.extend(transport.device().device_type().to_le_bytes());
    {
        let registers = transport.registers.lock();
        bytes.extend(registers.device_features_sel.to_le_bytes());
        bytes.extend(registers.driver_features_sel.to_le_bytes());
        bytes.extend(registers.queue_sel.to_le_bytes());
        bytes.extend(registers.driver_features.to_le_bytes());
    }
    bytes.extend(u32::from(transport.status()).to_le_bytes());
    let (interrupt_status, deferred) = queues.interrupts();
    bytes.extend((interrupt_status | deferred << DEFERRED).to_le_bytes());
    bytes.extend(queues.config_generation.load(Ordering::Acquire).to_le_bytes());
    bytes.extend(state_chains::count(queues.all.len()));
    for queue in &queues.all {
        save_queue(&queue.lock(), &mut bytes);
    }
    bytes.extend(own);
    Ok(bytes)
}

fn save_queue(queue: &Queue, bytes: &mut Vec<u8>) {
    let QueueState {
        max_size,
        next_avail,
        next_used,
        event_idx_enabled,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    } = queue.ring.state();
    for number in [max_size, next_avail, next_used, size] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend([u8::from(event_idx_enabled), u8::from(ready)]);
    for address in [desc_table, avail_ring, used_ring] {
        bytes.extend(address.to_le_bytes());
    }
    state_chains::save(queue, bytes);
}

/// The parsed state, before any of it is applied.
struct Saved {
    registers: Registers,
    status: u8,
    interrupt_status: u32,
    deferred: u32,
    config_generation: u32,
    queues: Vec<(QueueState, VecDeque<Taken>)>,
}

pub(super) fn restore(transport: &Transport, state: &[u8]) -> Result<()> {
    let name = transport.queues().name();
    let mut reader = Reader::new(name, state);
    let saved = parse(transport, &mut reader)?;
    let own = reader.rest();
    let queues = transport.queues();
    queues.stop();
    transport.device().reset();
    transport.device().restore(own)?;
    let is_active = saved.status & status::DRIVER_OK != 0 && saved.status & status::FAILED == 0;
    let features = saved.registers.driver_features;
    for (queue, (state, carried)) in queues.all.iter().zip(saved.queues) {
        let mut queue = queue.lock();
        queue.reset();
        queue.ring = Ring::try_from(state)
            .map_err(|error| bad(name, format!("a queue cannot be restored: {error}")))?;
        queue.carried = carried;
    }
    *transport.registers.lock() = saved.registers;
    queues.status.store(saved.status, Ordering::Release);
    queues.interrupt_status.store(saved.interrupt_status, Ordering::Release);
    queues.config_generation.store(saved.config_generation, Ordering::Release);
    if !is_active {
        return Ok(());
    }
    queues.start(features);
    queues.interrupt_unless_quiesced(saved.deferred);
    if saved.status & status::NEEDS_RESET != 0 || !queues.are_valid() {
        queues.fail("it needed a reset already, or its queues are not in memory");
        return Ok(());
    }
    transport.device().reactivate(queues, features);
    queues.notify_all();
    Ok(())
}

fn parse(transport: &Transport, reader: &mut Reader<'_>) -> Result<Saved> {
    let (name, device) = (transport.queues().name(), transport.device());
    let device_type = reader.u32()?;
    if device_type != device.device_type() {
        let ours = device.device_type();
        return Err(bad(name, format!("it is of type {ours}, the saved one of {device_type}")));
    }
    let registers = Registers {
        device_features_sel: reader.u32()?,
        driver_features_sel: reader.u32()?,
        queue_sel: reader.u32()?,
        driver_features: reader.u64()?,
        ..Registers::default()
    };
    let saved_status = reader.u32()?;
    let status = checked_status(transport, registers.driver_features, saved_status)?;
    let (interrupts, config_generation) = (reader.u32()?, reader.u32()?);
    let (interrupt_status, deferred) = (interrupts & 3, interrupts >> DEFERRED & 3);
    let all = &transport.queues().all;
    if usize::try_from(reader.u32()?) != Ok(all.len()) {
        return Err(bad(name, format!("it has {} queues, and the saved one others", all.len())));
    }
    let memory = transport.queues().memory();
    let mut queues = Vec::new();
    for queue in all {
        let max_size = queue.lock().ring.state().max_size;
        queues.push(parse_queue(name, max_size, memory, reader)?);
    }
    Ok(Saved { registers, status, interrupt_status, deferred, config_generation, queues })
}

/// The status bits that are known. A driver reaches them only with features that it may accept.
fn checked_status(transport: &Transport, features: u64, saved: u32) -> Result<u8> {
    let name = transport.queues().name();
    let known = u32::from(status::OF_DRIVER | status::NEEDS_RESET);
    let status = u8::try_from(saved & known).unwrap_or_default();
    let has = |bit: u8| status & bit != 0;
    let unknown = features & !transport.offered();
    if has(status::FEATURES_OK) && unknown != 0 {
        let detail = format!("the driver uses features that it does not have: {unknown:#x}");
        return Err(bad(name, detail));
    }
    let is_negotiated = has(status::FEATURES_OK) && transport.accepts(features);
    if (has(status::FEATURES_OK) || has(status::DRIVER_OK)) && !is_negotiated {
        let detail = format!("a driver cannot have the status {status:#x} with {features:#x}");
        return Err(bad(name, detail));
    }
    Ok(status)
}

fn parse_queue(
    name: &str,
    ours: u16,
    memory: &GuestMemory,
    reader: &mut Reader<'_>,
) -> Result<(QueueState, VecDeque<Taken>)> {
    let (max_size, next_avail, next_used) = (reader.u16()?, reader.u16()?, reader.u16()?);
    let size = reader.u16()?;
    let [event_idx_enabled, ready] = reader.take()?.map(|flag: u8| flag != 0);
    let (desc_table, avail_ring, used_ring) = (reader.u64()?, reader.u64()?, reader.u64()?);
    if max_size != ours {
        return Err(bad(name, format!("a queue has up to {ours} entries, the saved {max_size}")));
    }
    let carried = state_chains::parse(name, (size, max_size), memory, reader)?;
    let state = QueueState {
        max_size,
        next_avail,
        next_used,
        event_idx_enabled,
        size,
        ready,
        desc_table,
        avail_ring,
        used_ring,
    };
    Ok((state, carried))
}

#[cfg(test)]
mod tests {
    //! Covers src/virtio/queues.rs, src/virtio/queue.rs, src/virtio/access.rs.
    //! Covers src/virtio/state_chains.rs.
    //! Covers src/virtio/abandoned.rs, src/virtio/mock.rs, src/virtio/bus_device.rs.

    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use proptest::prelude::*;

    use super::super::mock::tests::rng;
    use super::super::mock::{MockDriver, writable};
    use super::super::registers::{CONFIGURATION_CHANGE, INTERRUPT_ACK};

    use crate::devices::Device;

    const AT: u64 = MockDriver::BUFFERS;

    fn started() -> MockDriver {
        let mut driver = rng();
        driver.start(0);
        driver
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
    fn an_interrupt_that_comes_while_the_machine_is_quiesced_is_raised_in_it_and_in_its_copies() {
        let (driver, copy) = (started(), started());
        let transport = &driver.attached.transport;
        let queues = transport.queues();
        let raised = |driver: &MockDriver| {
            let count = driver.attached.transport.queues().counts.interrupts.load(Relaxed);
            (driver.interrupt_status(), count)
        };
        Device::quiesce(&**transport).unwrap();
        Device::quiesce(&**transport).unwrap();
        queues.config_changed();
        let state = Device::save(&**transport).unwrap();
        Device::resume(&**transport);
        assert_eq!(raised(&driver), (0, 0), "it is still quiesced");
        Device::resume(&**transport);
        assert_eq!(raised(&driver), (CONFIGURATION_CHANGE, 1));
        Device::restore(&*copy.attached.transport, &state).unwrap();
        assert_eq!(raised(&copy), (CONFIGURATION_CHANGE, 1));
        // A copy of a guest that has not acknowledged it has its edge in the interrupt controllers.
        let state = Device::save(&**transport).unwrap();
        Device::restore(&*copy.attached.transport, &state).unwrap();
        assert_eq!(raised(&copy), (CONFIGURATION_CHANGE, 1));
        // A reset of the device forgets it.
        Device::quiesce(&**transport).unwrap();
        queues.config_changed();
        Device::restore(&**transport, &state).unwrap();
        Device::resume(&**transport);
        assert_eq!(raised(&driver), (CONFIGURATION_CHANGE, 1));
    }

    #[test]
    fn an_interrupt_is_whole_before_the_machine_is_quiesced() {
        let driver = started();
        let transport = &driver.attached.transport;
        let (queues, ends) = (transport.queues(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(Relaxed) {
                    queues.config_changed()
                }
            });
            for _ in 0..1000 {
                Device::quiesce(&**transport).unwrap();
                let before = queues.counts.interrupts.load(Relaxed);
                driver.write(INTERRUPT_ACK, 3);
                std::thread::yield_now();
                assert_eq!(
                    (driver.interrupt_status(), before),
                    (0, queues.counts.interrupts.load(Relaxed))
                );
                Device::resume(&**transport);
            }
            ends.store(true, Relaxed);
        });
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
    fn a_status_that_no_driver_reaches_is_refused() {
        const FEATURES: usize = 16;
        const STATUS: usize = 24;
        let driver = started();
        let transport = &*driver.attached.transport;
        let state = Device::save(transport).unwrap();
        assert_eq!(state[STATUS], 15);
        let refused = |at: usize, byte: u8| {
            let mut state = state.clone();
            state[at] = byte;
            let error = Device::restore(transport, &state).unwrap_err();
            assert!(error.detail.contains("status"), "{error}");
        };
        // Without FEATURES_OK, and without VERSION_1.
        refused(STATUS, 7);
        refused(FEATURES + 4, 0);
        assert_eq!(transport.status(), 15, "nothing has changed");
        Device::restore(transport, &state).unwrap();
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
}
