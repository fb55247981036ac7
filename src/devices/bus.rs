//! The port and memory-mapped buses: which device answers an access, and a count of those nobody answers.
//! Lookups come from every vCPU's thread at once; a device does its own locking.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::Exit;

/// What becomes of the vCPU after an access.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// It goes on.
    Continue,
    /// The guest has ended.
    End(Exit),
}

/// Something that answers accesses on a bus. Offsets count from the start of its range.
pub trait Device: Send + Sync + fmt::Debug {
    /// Fill `data` with what the guest reads.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Take what the guest wrote.
    fn write(&self, offset: u64, data: &[u8]) -> Flow;

    /// What a snapshot keeps of it. Nothing, for a device without state. The guest is at rest.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when it cannot be kept.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Become what was saved. The guest is at rest.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`] when that is nothing `save` gives.
    fn restore(&self, state: &[u8]) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Snapshot, "device", "it has no state to bring back"))
    }
}

/// Which of a machine's two buses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Ports, by IN and OUT.
    Pio,
    /// Guest-physical addresses without RAM.
    Mmio,
}

/// How often an address nobody answers was read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unanswered {
    /// Reads; each gave all ones.
    pub reads: u64,
    /// Writes; each was dropped.
    pub writes: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    base: u64,
    length: u64,
    device: Arc<dyn Device>,
}

/// One bus.
#[derive(Debug, Default)]
pub struct Bus {
    /// Sorted by base, without overlap.
    entries: RwLock<Vec<Entry>>,
}

impl Bus {
    /// Put a device on the bus.
    ///
    /// # Errors
    /// When the range is empty, wraps around, or overlaps another device's.
    pub fn add(&self, base: u64, length: u64, device: Arc<dyn Device>) -> Result<()> {
        let refuse =
            |detail: String| Err(Error::new(ErrorKind::Config, format!("{base:#x}"), detail));
        let Some(last) = length.checked_sub(1).and_then(|l| base.checked_add(l)) else {
            return refuse(format!("a device cannot have {length} addresses here"));
        };
        let mut entries = self.entries.write();
        let at = entries.partition_point(|e| e.base < base);
        let neighbours = [at.checked_sub(1), Some(at)];
        for entry in neighbours.into_iter().flatten().filter_map(|n| entries.get(n)) {
            if entry.base <= last && base - entry.base.min(base) < entry.length {
                return refuse(format!("overlaps the device at {:#x}", entry.base));
            }
        }
        entries.insert(at, Entry { base, length, device });
        Ok(())
    }

    /// First address, number of addresses and device of each range, by address.
    #[must_use]
    pub fn devices(&self) -> Vec<(u64, u64, Arc<dyn Device>)> {
        let entries = self.entries.read();
        entries.iter().map(|e| (e.base, e.length, Arc::clone(&e.device))).collect()
    }

    /// The device that answers all of this access, and the offset in it.
    fn find(&self, address: u64, length: usize) -> Option<(Arc<dyn Device>, u64)> {
        let entries = self.entries.read();
        let entry = entries.get(entries.partition_point(|e| e.base <= address).checked_sub(1)?)?;
        let offset = address - entry.base;
        let fits = offset < entry.length && u64::try_from(length).ok()? <= entry.length - offset;
        fits.then(|| (Arc::clone(&entry.device), offset))
    }
}

/// The two buses of a machine, and what nobody answers on them.
#[derive(Debug, Default)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    unanswered: Mutex<Counts>,
}

/// A guest can touch any number of addresses: the first so many are kept apart.
const MOST_COUNTED: usize = 1024;

#[derive(Debug, Default)]
struct Counts {
    by_address: BTreeMap<(Access, u64), Unanswered>,
    others: Unanswered,
}

impl Buses {
    /// `IN` and `INS`: elements of `size` bytes, one after the other from the same port.
    pub(crate) fn port_in(&self, port: u16, data: &mut [u8], size: usize) -> Flow {
        for element in data.chunks_mut(size) {
            self.read(Access::Pio, u64::from(port), element);
        }
        Flow::Continue
    }

    /// `OUT` and `OUTS`.
    pub(crate) fn port_out(&self, port: u16, data: &[u8], size: usize) -> Flow {
        for element in data.chunks(size) {
            let flow = self.write(Access::Pio, u64::from(port), element);
            if flow != Flow::Continue {
                return flow;
            }
        }
        Flow::Continue
    }

    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) -> Flow {
        self.read(Access::Mmio, address, data);
        Flow::Continue
    }

    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) -> Flow {
        self.write(Access::Mmio, address, data)
    }

    /// Counts of what nobody answered: by address, and of the addresses beyond the first 1,024.
    #[must_use]
    pub fn unanswered(&self) -> (Vec<(Access, u64, Unanswered)>, Unanswered) {
        let counts = self.unanswered.lock();
        let rows = counts.by_address.iter().map(|((access, address), n)| (*access, *address, *n));
        (rows.collect(), counts.others)
    }

    fn bus(&self, access: Access) -> &Bus {
        match access {
            Access::Pio => &self.pio,
            Access::Mmio => &self.mmio,
        }
    }

    fn read(&self, access: Access, address: u64, data: &mut [u8]) {
        // All ones is what a PC's bus gives where no device drives it.
        data.fill(0xff);
        match self.bus(access).find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => self.count(access, address, |n| n.reads += 1),
        }
    }

    fn write(&self, access: Access, address: u64, data: &[u8]) -> Flow {
        if let Some((device, offset)) = self.bus(access).find(address, data.len()) {
            return device.write(offset, data);
        }
        self.count(access, address, |n| n.writes += 1);
        Flow::Continue
    }

    fn count(&self, access: Access, address: u64, add: impl FnOnce(&mut Unanswered)) {
        let mut counts = self.unanswered.lock();
        let room = counts.by_address.len() < MOST_COUNTED;
        let Counts { by_address, others } = &mut *counts;
        match by_address.entry((access, address)) {
            std::collections::btree_map::Entry::Occupied(entry) => add(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) if room => {
                add(entry.insert(Unanswered::default()))
            }
            std::collections::btree_map::Entry::Vacant(_) => add(others),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug)]
    struct Constant(u8);

    impl Device for Constant {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Flow {
            Flow::Continue
        }
    }

    fn add(bus: &Bus, base: u64, length: u64) -> Result<()> {
        bus.add(base, length, Arc::new(Constant(7)))
    }

    #[test]
    fn overlaps_are_refused_and_neighbours_are_not() {
        let bus = Bus::default();
        add(&bus, 0x100, 0x10).unwrap();
        for (base, length) in [(0x100, 1), (0xff, 2), (0x10f, 1), (0x80, 0x1000), (0x108, 2)] {
            assert!(add(&bus, base, length).is_err(), "{base:#x}+{length:#x}");
        }
        add(&bus, 0xf0, 0x10).unwrap();
        add(&bus, 0x110, 1).unwrap();
        assert!(add(&bus, 5, 0).is_err());
        assert!(add(&bus, u64::MAX, 2).is_err());
        add(&bus, u64::MAX, 1).unwrap();
    }

    #[test]
    fn an_access_nobody_answers_is_counted() {
        let buses = Buses::default();
        let mut data = [0; 2];
        buses.port_in(0x80, &mut data, 2);
        buses.port_out(0x80, &[1, 2, 3], 1);
        assert_eq!(data, [0xff, 0xff]);
        let expected = Unanswered { reads: 1, writes: 3 };
        assert_eq!(buses.unanswered().0, [(Access::Pio, 0x80, expected)]);
    }

    #[test]
    fn counts_are_bounded() {
        let buses = Buses::default();
        for address in 0..2000 {
            buses.mmio_write(address * 8, &[0]);
        }
        let (rows, others) = buses.unanswered();
        assert_eq!((rows.len(), others.writes), (1024, 976));
    }

    proptest! {
        #[test]
        fn find_agrees_with_the_ranges(ranges in prop::collection::vec((0u64..256, 1u64..32), 0..12),
                                       address in 0u64..300, length in 1usize..9) {
            let bus = Bus::default();
            let mut added: Vec<(u64, u64)> = Vec::new();
            for (base, size) in ranges {
                let overlaps = added.iter().any(|(b, s)| base < b + s && *b < base + size);
                prop_assert_eq!(add(&bus, base, size).is_err(), overlaps);
                if !overlaps {
                    added.push((base, size));
                }
            }
            let end = address + length as u64;
            let expected = added.iter().find(|(b, s)| *b <= address && end <= b + s);
            let found = bus.find(address, length).map(|(_, offset)| offset);
            prop_assert_eq!(found, expected.map(|(b, _)| address - b));
        }
    }
}
