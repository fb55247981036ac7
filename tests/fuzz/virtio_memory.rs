//! Guest memory of an input, with a copy that has what the driver writes and nothing that the device
//! does, and where the device may write.

use pyvmm::memory::GuestMemory;
use pyvmm::virtio::mock::Served;

use super::virtio_host::{Host, HostFolder};
use super::virtio_run::{Checked, QUEUES, Run};

/// Guest memory: the rings of 16 queues, and behind them the buffers.
pub(crate) const SIZE: usize = 0x15_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) type Range = (u64, u64);

/// What all inputs share.
pub(crate) struct Room {
    pub(crate) place: HostFolder,
    pub(crate) memory: GuestMemory,
    /// What memory contains if the device writes nothing.
    pub(crate) shadow: Vec<u8>,
    /// What it contains.
    found: Vec<u8>,
    /// What the buffers contain at first.
    pub(crate) pattern: Vec<u8>,
}

impl Room {
    /// With this qcow2 image for disks.
    pub(crate) fn new(image: Vec<u8>) -> Self {
        let memory = GuestMemory::new(SIZE as u64).unwrap();
        let (shadow, found) = (vec![0; SIZE], vec![0; SIZE]);
        let pattern = (0..0x2_0000_u32).map(|n| ((n * 7) >> 3).to_le_bytes()[0] | 1).collect();
        Self { place: HostFolder::new(image), memory, shadow, found, pattern }
    }
}

fn number<const N: usize>(bytes: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

impl Run<'_> {
    pub(crate) fn u16(&self, at: u64) -> u16 {
        number(&self.room.shadow, at).map_or(0, u16::from_le_bytes)
    }

    /// Write as the driver. A thread of the device may read it at once.
    pub(crate) fn put(&mut self, address: u64, bytes: &[u8]) {
        let Ok(at) = usize::try_from(address) else { return };
        let Some(end) = at.checked_add(bytes.len()).filter(|end| *end <= SIZE) else { return };
        self.room.shadow[at..end].copy_from_slice(bytes);
        if Host::is_threaded(self.kind) {
            self.offer();
        }
        self.driver.memory.write(address, bytes).unwrap();
    }

    pub(crate) fn served(&self) -> Vec<(usize, Served)> {
        (0..QUEUES).filter_map(|at| self.driver.served(at).map(|served| (at, served))).collect()
    }

    /// Note where the device may write: in used rings, and in the buffers of the chains that were
    /// made available.
    pub(crate) fn offer(&mut self) {
        let served = self.served();
        let epoch = self.driver.attached.transport.queues().epoch();
        let (mut structures, mut writes) = (Vec::new(), Vec::new());
        for (at, queue) in &served {
            let size = u64::from(queue.size);
            let used = (queue.used, queue.used + 6 + 8 * size);
            structures.push((queue.descriptors, queue.descriptors + 16 * size));
            structures.push((queue.available, queue.available + 6 + 2 * size));
            self.is_wild |= structures.iter().any(|other| overlap(*other, used));
            structures.push(used);
            self.offered.push(used);
            if self.walked[*at].0 != epoch {
                self.walked[*at] = (epoch, queue.next);
            }
            let end = self.u16(queue.available + 2);
            let mut index = self.walked[*at].1;
            if end.wrapping_sub(index) > queue.size {
                index = queue.next;
            }
            while index != end && end.wrapping_sub(index) <= queue.size {
                let slot = u64::from(index % queue.size);
                let head = self.u16(queue.available + 4 + 2 * slot);
                self.walk(queue, head, &mut structures, &mut writes);
                index = index.wrapping_add(1);
            }
        }
        let is_wild = |range: &Range| structures.iter().any(|other| overlap(*other, *range));
        self.is_wild |= writes.iter().any(is_wild);
        self.offered.append(&mut writes);
        self.offered.sort_unstable();
        self.offered.dedup();
    }

    fn walk(&self, queue: &Served, head: u16, tables: &mut Vec<Range>, writes: &mut Vec<Range>) {
        let (mut table, mut count, mut index) = (queue.descriptors, u64::from(queue.size), head);
        for _ in 0..1024 {
            if u64::from(index) >= count {
                return;
            }
            let at = table + 16 * u64::from(index);
            let Some(address) = number(&self.room.shadow, at).map(u64::from_le_bytes) else {
                return;
            };
            let length = number(&self.room.shadow, at + 8).map_or(0, u32::from_le_bytes);
            let (flags, next) = (self.u16(at + 12), self.u16(at + 14));
            let range = (address, address.saturating_add(length.into()).min(SIZE as u64));
            if flags & INDIRECT != 0 {
                tables.push(range);
                (table, count, index) = (address, u64::from(length / 16), 0);
                if address > SIZE as u64 {
                    return;
                }
                continue;
            }
            if flags & WRITE != 0 && range.0 < range.1 {
                writes.push(range);
            }
            if flags & NEXT == 0 {
                return;
            }
            index = next;
        }
    }

    /// Compare memory with what it should contain.
    pub(crate) fn check(&mut self) -> Checked {
        if self.is_wild {
            return Ok(());
        }
        let Room { memory, shadow, found, .. } = &mut *self.room;
        memory.read(0, found).unwrap();
        let (mut at, end) = (0, (SIZE as u64, SIZE as u64));
        for (start, stop) in self.offered.iter().copied().chain([end]) {
            let (start, stop) = (usize::try_from(start).unwrap(), usize::try_from(stop).unwrap());
            if start > at && found[at..start] != shadow[at..start] {
                let is_balloon = self.kind == "balloon";
                // It may be a page of the rings.
                self.is_wild = true;
                check_bytes(found, shadow, at..start, is_balloon)?;
            }
            at = at.max(stop);
        }
        // What the device wrote is what the next request begins with.
        std::mem::swap(shadow, found);
        Ok(())
    }
}

/// Bytes differ in this range. A balloon gives pages to the host, which then are zero.
fn check_bytes(
    found: &[u8],
    expected: &[u8],
    mut range: std::ops::Range<usize>,
    is_balloon: bool,
) -> Checked {
    let is_written = |at: &usize| found[*at] != expected[*at] && !(is_balloon && found[*at] == 0);
    match range.find(is_written) {
        Some(at) => Err(format!("the device has written at {at:#x}, outside of its buffers")),
        None => Ok(()),
    }
}

fn overlap(one: Range, other: Range) -> bool {
    one.0 < other.1 && other.0 < one.1
}
