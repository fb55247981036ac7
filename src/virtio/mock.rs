//! A driver for tests, benchmarks and fuzzing, on the other side of a device: it sets the device up
//! through its registers, lays out the queues, and runs the loop. On one thread.

use std::sync::Arc;

use super::attach::{Attached, Board, attach};
use super::device::VirtioDevice;
use super::place::Place;
use super::registers::*;
use crate::devices::{Buses, Device};
use crate::error::Result;
use crate::event::EventManager;
use crate::layout;
use crate::memory::GuestMemory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// The queues begin here, each this far from the one before.
const QUEUES: u64 = 0x1_0000;
const QUEUE_ROOM: u64 = 0x1_0000;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub is_writable: bool,
}

/// What the device reads.
#[must_use]
pub fn readable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, is_writable: false }
}

/// What the device writes.
#[must_use]
pub fn writable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, is_writable: true }
}

/// A queue as the device has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// How many entries it has.
    pub size: u16,
    /// The address of the descriptors.
    pub descriptors: u64,
    /// The address of the available ring.
    pub available: u64,
    /// The address of the used ring.
    pub used: u64,
    /// The index in the available ring of the next chain that the device takes.
    pub next: u16,
    /// How many chains the device has taken and not given back.
    pub held: usize,
}

/// The driver's side of a queue.
#[derive(Debug)]
struct Ring {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
    /// The descriptors of each chain in flight, by its head.
    in_flight: std::collections::BTreeMap<u16, Vec<u16>>,
}

/// See the module.
#[derive(Debug)]
pub struct MockDriver {
    /// The device.
    pub attached: Attached,
    /// Guest memory. Buffers may be anywhere from [`Self::BUFFERS`] on.
    pub memory: GuestMemory,
    manager: EventManager,
    rings: Vec<Ring>,
}

impl MockDriver {
    /// Memory from here on has no queue in it, if the device has at most 15 queues.
    pub const BUFFERS: u64 = 0x10_0000;

    /// A driver of a device in memory of this size, which it has not set up yet.
    ///
    /// # Errors
    /// If the process is out of memory or descriptors.
    pub fn new(device: Arc<dyn VirtioDevice>, size_mib: u64) -> Result<Self> {
        Self::over(device, GuestMemory::new(size_mib << 20)?)
    }

    /// Such a driver in memory that is there.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn over(device: Arc<dyn VirtioDevice>, memory: GuestMemory) -> Result<Self> {
        let place = Place { base: layout::VIRTIO, line: None };
        let board = Board {
            buses: &Buses::default(),
            memory: &memory,
            line: &|_| None,
            doorbell: &|| None,
        };
        let attached = attach(&board, "device", place, device)?;
        let manager = EventManager::new()?;
        attached.connect(&manager);
        Ok(Self { attached, memory, manager, rings: Vec::new() })
    }

    /// Read a register.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.attached.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Write a register.
    pub fn write(&self, offset: u64, value: u32) {
        self.attached.transport.write(offset, &value.to_le_bytes());
    }

    /// Read the configuration space.
    pub fn config(&self, offset: u64, data: &mut [u8]) {
        self.attached.transport.read(CONFIG + offset, data);
    }

    /// Write the configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.attached.transport.write(CONFIG + offset, data);
    }

    /// The feature bits that the device offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write(DEVICE_FEATURES_SEL, select);
            u64::from(self.read(DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Reset the device, accept these features and `VERSION_1`, set up its queues and start it.
    /// Returns the status.
    pub fn start(&mut self, features: u64) -> u32 {
        self.greet(features | VERSION_1);
        self.set_up_queues();
        self.write(STATUS, 15);
        self.read(STATUS)
    }

    /// Reset the device and accept these features. Returns the status.
    pub fn greet(&mut self, features: u64) -> u32 {
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(DRIVER_FEATURES_SEL, select);
            self.write(DRIVER_FEATURES, u32::try_from(half).unwrap_or(0));
        }
        self.write(STATUS, 11);
        self.read(STATUS)
    }

    /// Set up all queues.
    pub fn set_up_queues(&mut self) {
        self.rings.clear();
        for (index, start) in (0..16).zip((QUEUES..).step_by(0x1_0000)) {
            self.write(QUEUE_SEL, index);
            let most = self.read(QUEUE_NUM_MAX).min(256);
            let Ok(size) = u16::try_from(most) else { return };
            if size == 0 {
                return;
            }
            let _ = self.memory.fill(start, QUEUE_ROOM, 0);
            // Not by upstream's mock queue, whose used ring begins in the available ring.
            let descriptors = start;
            let available = descriptors + 16 * u64::from(size);
            let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
            self.write(QUEUE_NUM, u32::from(size));
            for (register, address) in [
                (QUEUE_DESC_LOW, descriptors),
                (QUEUE_DRIVER_LOW, available),
                (QUEUE_DEVICE_LOW, used),
            ] {
                self.write(register, u32::try_from(address).unwrap_or(0));
                self.write(register + 4, 0);
            }
            self.write(QUEUE_READY, 1);
            self.rings.push(Ring {
                size,
                descriptors,
                available,
                used,
                next_available: 0,
                next_used: 0,
                free: (0..size).rev().collect(),
                in_flight: std::collections::BTreeMap::new(),
            });
        }
    }

    /// Make a chain available. Returns its head; None if the queue has no descriptors for it.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer]) -> Option<u16> {
        let ring = self.rings.get_mut(queue)?;
        if ring.free.len() < buffers.len() {
            return None;
        }
        let chain: Vec<u16> = buffers.iter().filter_map(|_| ring.free.pop()).collect();
        let head = *chain.first()?;
        for (place, (index, buffer)) in chain.iter().zip(buffers).enumerate() {
            let next = chain.get(place + 1);
            let flags = if buffer.is_writable { WRITE } else { 0 } | next.map_or(0, |_| NEXT);
            let mut bytes = buffer.address.to_le_bytes().to_vec();
            bytes.extend(buffer.length.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.copied().unwrap_or(0).to_le_bytes());
            let _ = self.memory.write(ring.descriptors + 16 * u64::from(*index), &bytes);
        }
        ring.in_flight.insert(head, chain);
        let slot = u64::from(ring.next_available % ring.size);
        let _ = self.memory.store(ring.available + 4 + 2 * slot, head);
        ring.next_available = ring.next_available.wrapping_add(1);
        let _ = self.memory.store(ring.available + 2, ring.next_available);
        Some(head)
    }

    /// Write a descriptor as it is: address, length, flags, next.
    pub fn set_descriptor(&self, queue: usize, index: u16, raw: (u64, u32, u16, u16)) {
        let Some(ring) = self.rings.get(queue) else { return };
        let mut bytes = raw.0.to_le_bytes().to_vec();
        bytes.extend(raw.1.to_le_bytes());
        bytes.extend(raw.2.to_le_bytes());
        bytes.extend(raw.3.to_le_bytes());
        let _ = self.memory.write(ring.descriptors + 16 * u64::from(index), &bytes);
    }

    /// Make a head available as it is, whatever its descriptors are.
    pub fn add_head(&mut self, queue: usize, head: u16) {
        let Some(ring) = self.rings.get_mut(queue) else { return };
        let slot = u64::from(ring.next_available % ring.size);
        let _ = self.memory.store(ring.available + 4 + 2 * slot, head);
        ring.next_available = ring.next_available.wrapping_add(1);
        let _ = self.memory.store(ring.available + 2, ring.next_available);
    }

    /// Where the available and the used ring of a queue are.
    #[must_use]
    pub fn rings(&self, queue: usize) -> Option<(u64, u64)> {
        self.rings.get(queue).map(|ring| (ring.available, ring.used))
    }

    /// Set the index of the available ring.
    pub fn set_available(&self, queue: usize, index: u16) {
        if let Some(ring) = self.rings.get(queue) {
            let _ = self.memory.store(ring.available + 2, index);
        }
    }

    /// Notify the device of a queue.
    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// Whether the device wants to be notified of what is added to a queue. Without the event
    /// index.
    #[must_use]
    pub fn wants_notification(&self, queue: usize) -> bool {
        let flags = self.rings.get(queue).and_then(|ring| self.memory.load::<u16>(ring.used).ok());
        flags.is_none_or(|flags| flags & 1 == 0)
    }

    /// Run one iteration of the loop, which waits at most this long. Returns how many events there
    /// were.
    ///
    /// # Errors
    /// If epoll fails.
    pub fn turn(&self, milliseconds: i32) -> Result<usize> {
        self.manager.run_with_timeout(milliseconds)
    }

    /// Take the next chain that the device has given back: its head, and the bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = self.rings.get_mut(queue)?;
        let index: u16 = self.memory.load(ring.used + 2).ok()?;
        if index == ring.next_used {
            return None;
        }
        let at = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
        ring.next_used = ring.next_used.wrapping_add(1);
        let (head, length) = (self.memory.load::<u32>(at).ok()?, self.memory.load(at + 4).ok()?);
        let head = u16::try_from(head).ok()?;
        ring.free.extend(ring.in_flight.remove(&head).into_iter().flatten().rev());
        Some((head, length))
    }

    /// Add a chain, notify the device, and run the loop until it is given back. Returns how many
    /// bytes were written; None if it is not within ten seconds.
    pub fn exchange(&mut self, queue: u32, buffers: &[Buffer]) -> Option<u32> {
        let at = usize::try_from(queue).ok()?;
        let head = self.add(at, buffers)?;
        self.notify(queue);
        for _ in 0..100 {
            if let Some((found, written)) = self.used(at) {
                return (found == head).then_some(written);
            }
            self.turn(100).ok()?;
        }
        None
    }

    /// A queue as the device has it; None unless it serves the queue.
    #[must_use]
    pub fn served(&self, queue: usize) -> Option<Served> {
        let queues = self.attached.transport.queues();
        let is_broken = self.attached.transport.status() & status::NEEDS_RESET != 0;
        queues.features().filter(|_| !is_broken)?;
        let queue = queues.all.get(queue)?.lock();
        let ring = queue.ring.state();
        ring.ready.then_some(Served {
            size: ring.size,
            descriptors: ring.desc_table,
            available: ring.avail_ring,
            used: ring.used_ring,
            next: ring.next_avail,
            held: queue.taken.len() + queue.carried.len(),
        })
    }

    /// The reasons of interrupts that were not acknowledged.
    #[must_use]
    pub fn interrupt_status(&self) -> u32 {
        self.read(INTERRUPT_STATUS)
    }
}

/// As a machine's end.
impl Drop for MockDriver {
    fn drop(&mut self) {
        self.attached.close();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::RngConfig;
    use crate::virtio::Rng;

    /// The driver of an entropy device, which gives the same numbers each time.
    pub(in super::super) fn rng() -> MockDriver {
        MockDriver::new(Arc::new(Rng::new(RngConfig { seed: Some(7) })), 4).unwrap()
    }
}
