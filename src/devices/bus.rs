//! The port and memory-mapped buses, which find the device for an access, and counts of unanswered
//! accesses. All vCPU threads look devices up concurrently; a device does its own locking.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::Outcome;
use crate::hop::hop;
use crate::resources::ResourceKind;
use crate::sync::{CachedArc, Mutex, Published, rank};

/// Something that answers accesses on a bus. Offsets count from the start of its range.
pub trait Device: Send + Sync + fmt::Debug {
    /// Fill `data` with the value that the guest reads. It contains all one bits before the call.
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome;

    /// Handle a write of the guest.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome;

    /// `INS`: elements of `size` bytes, all from the same offset.
    fn read_many(&self, offset: u64, data: &mut [u8], size: usize) -> Outcome {
        each(data.chunks_mut(size), |element| self.read(offset, element))
    }

    /// `OUTS`: elements of `size` bytes, all to the same offset.
    fn write_many(&self, offset: u64, data: &[u8], size: usize) -> Outcome {
        each(data.chunks(size), |element| self.write(offset, element))
    }

    /// Its name in traces and answers; the owner's in `resources`.
    fn name(&self) -> &str {
        let name = std::any::type_name::<Self>();
        name.rsplit("::").next().unwrap_or(name)
    }

    /// Whether it accepts all elements of a repeated `OUTS` in one call.
    fn coalesces_outs(&self) -> bool {
        false
    }

    /// Wait until the device has room for more, or until `is_called_out` is true after a
    /// [`Self::wake`]. Called on the vCPU's thread before it enters the guest again. Returns
    /// whether there is room.
    fn wait_for_room(&self, _is_called_out: &dyn Fn() -> bool) -> bool {
        true
    }

    /// Make vCPU threads that wait for room check `is_called_out` again.
    fn wake(&self) {}

    /// Whether it calls the program's code, which may block and access the vCPU meanwhile.
    fn may_block(&self) -> bool {
        false
    }

    /// Whether something other than the guest's accesses changes what the guest sees of the device,
    /// such as input, a timer or a thread. Then [`Self::quiesce`] and [`Self::resume`] are called.
    fn acts_by_itself(&self) -> bool {
        false
    }

    /// Stop changing what the guest can see, including memory and interrupt lines, until
    /// [`Self::resume`]. Called when the machine is paused, snapshotted or reset. Calls nest, and
    /// each has its own call of `resume`. The vCPUs are stopped, or their last access is being
    /// completed.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the device cannot be quiesced. The machine then continues.
    fn quiesce(&self) -> Result<()> {
        Ok(())
    }

    /// Undo a [`Self::quiesce`].
    fn resume(&self) {}

    /// The device's state for a snapshot; empty for a device without state. The vCPUs are stopped.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the device cannot be saved.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// # Errors
    /// [`ErrorKind::State`] if the device cannot be restored.
    fn check_restorable(&self) -> Result<()> {
        Ok(())
    }

    /// Restore a saved state. The vCPUs are stopped.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`] if the state is not in the format of `save`.
    fn restore(&self, state: &[u8]) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Snapshot, "device", "the device has no state to restore"))
    }
}

/// Make the accesses in order until one does not continue.
pub fn each<T>(elements: impl Iterator<Item = T>, access: impl FnMut(T) -> Outcome) -> Outcome {
    elements.map(access).find(|outcome| *outcome != Outcome::Continue).unwrap_or(Outcome::Continue)
}

/// Which of a machine's two buses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Ports, by IN and OUT.
    Pio,
    /// Guest-physical addresses without RAM.
    Mmio,
}

impl Access {
    /// The kind of its ranges as resources.
    #[must_use]
    pub fn kind(self) -> ResourceKind {
        match self {
            Self::Pio => ResourceKind::Pio,
            Self::Mmio => ResourceKind::Mmio,
        }
    }
}

/// How often an address without a device was read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unanswered {
    /// Reads; each returned all one bits.
    pub reads: u64,
    /// Writes; each was dropped.
    pub writes: u64,
}

/// A device of a bus, and its range.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    base: u64,
    length: u64,
    device: Arc<dyn Device>,
}

/// A vCPU's copy of the devices of a bus.
pub(crate) type BusCache = CachedArc<[Entry]>;

/// One bus.
#[derive(Debug, Default)]
pub struct Bus {
    /// Sorted by base, without overlap: each range has been claimed.
    entries: Published<[Entry], rank::Bus>,
}

impl Bus {
    /// Add a device to the bus, at a range that has been claimed for it (`platform.rs`).
    pub(crate) fn add(&self, base: u64, length: u64, device: Arc<dyn Device>) {
        self.entries.change(|entries| {
            let mut entries = entries.to_vec();
            let at = entries.partition_point(|e| e.base < base);
            let before = at.checked_sub(1).and_then(|last| entries.get(last));
            debug_assert!(before.is_none_or(|e| base - e.base >= e.length), "it is claimed");
            debug_assert!(entries.get(at).is_none_or(|e| e.base - base >= length), "it is claimed");
            entries.insert(at, Entry { base, length, device });
            (entries.into(), ())
        });
    }

    /// The devices that act by themselves.
    pub(super) fn acting(&self) -> Vec<Arc<dyn Device>> {
        let entries = self.entries.load();
        let acting = entries.iter().filter(|e| e.device.acts_by_itself());
        acting.map(|e| Arc::clone(&e.device)).collect()
    }

    /// Remove the device whose range starts here. An access that has already found it is still
    /// answered.
    ///
    /// # Errors
    /// If none does.
    pub fn remove(&self, base: u64) -> Result<Arc<dyn Device>> {
        let (_, removed) = self.entries.change(|entries| {
            match entries.binary_search_by_key(&base, |entry| entry.base) {
                Ok(at) => {
                    let mut entries = entries.to_vec();
                    let device = entries.remove(at).device;
                    (entries.into(), Some(device))
                }
                Err(_) => (Arc::clone(entries), None),
            }
        });
        removed.ok_or_else(|| {
            let detail = "no device's range starts here";
            Error::new(ErrorKind::Config, format!("{base:#x}"), detail)
        })
    }

    /// Take every device away.
    pub(crate) fn clear(&self) -> impl Sized + use<> {
        self.entries.change(|_| (Arc::new([]), ()))
    }

    /// Every device with its range.
    #[must_use]
    pub fn devices(&self) -> Vec<(u64, u64, Arc<dyn Device>)> {
        let entries = self.entries.load();
        entries.iter().map(|e| (e.base, e.length, Arc::clone(&e.device))).collect()
    }

    /// The device whose range contains the whole access, and the offset in it.
    pub(crate) fn find<'a>(
        &self,
        copy: &'a mut BusCache,
        address: u64,
        length: usize,
    ) -> Option<(&'a Arc<dyn Device>, u64)> {
        hop!();
        let entries = self.entries.read(copy);
        let entry = entries.get(entries.partition_point(|e| e.base <= address).checked_sub(1)?)?;
        let offset = address - entry.base;
        let fits = offset < entry.length && u64::try_from(length).ok()? <= entry.length - offset;
        fits.then_some((&entry.device, offset))
    }
}

/// The two buses of a machine, and counts of their unanswered accesses.
#[derive(Debug, Default)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    unanswered: Mutex<Counts, rank::Unanswered>,
}

/// A guest can access any number of addresses. The first ones, up to this limit, are counted
/// separately.
const MAX_COUNTED: usize = 1024;

#[derive(Debug, Default)]
struct Counts {
    by_address: BTreeMap<(Access, u64), Unanswered>,
    others: Unanswered,
}

impl Buses {
    /// Counts of unanswered accesses by address, and their sum beyond the first 1,024 addresses.
    #[must_use]
    pub fn unanswered(&self) -> (Vec<(Access, u64, Unanswered)>, Unanswered) {
        let counts = self.unanswered.lock();
        let rows = counts.by_address.iter().map(|((access, address), n)| (*access, *address, *n));
        (rows.collect(), counts.others)
    }

    /// Reset the counts.
    pub(crate) fn forget_unanswered(&self) {
        *self.unanswered.lock() = Counts::default();
    }

    /// One of the two.
    #[must_use]
    pub fn bus(&self, access: Access) -> &Bus {
        match access {
            Access::Pio => &self.pio,
            Access::Mmio => &self.mmio,
        }
    }

    /// Count an unanswered read or write.
    pub(crate) fn count_unanswered(&self, access: Access, address: u64, is_read: bool) {
        self.count(access, address, |n| if is_read { n.reads += 1 } else { n.writes += 1 });
    }

    fn count(&self, access: Access, address: u64, add: impl FnOnce(&mut Unanswered)) {
        let mut counts = self.unanswered.lock();
        let room = counts.by_address.len() < MAX_COUNTED;
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
    use crate::devices::claim_range;
    use crate::resources::Resources;
    use proptest::prelude::*;

    #[derive(Debug)]
    struct Constant(u8);

    impl Device for Constant {
        fn read(&self, _offset: u64, data: &mut [u8]) -> Outcome {
            data.fill(self.0);
            Outcome::Continue
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
            Outcome::Continue
        }
    }

    fn add(bus: &Bus, base: u64, length: u64) {
        bus.add(base, length, Arc::new(Constant(7)));
    }

    /// As a machine adds one.
    fn claim_and_add(claims: &Resources, bus: &Bus, base: u64, length: u64) -> Result<()> {
        claim_range(claims, Access::Pio, (base, length), "a device")?;
        add(bus, base, length);
        Ok(())
    }

    #[test]
    fn overlaps_are_refused_and_neighbours_are_not() {
        let (claims, bus) = (Resources::default(), Bus::default());
        let add = |base, length| claim_and_add(&claims, &bus, base, length);
        add(0x100, 0x10).unwrap();
        for (base, length) in [(0x100, 1), (0xff, 2), (0x10f, 1), (0x80, 0x1000), (0x108, 2)] {
            assert!(add(base, length).is_err(), "{base:#x}+{length:#x}");
        }
        add(0xf0, 0x10).unwrap();
        add(0x110, 1).unwrap();
        assert!(add(5, 0).is_err());
        assert!(add(u64::MAX, 2).is_err());
        add(u64::MAX, 1).unwrap();
    }

    #[test]
    fn accesses_nobody_answers_are_counted_up_to_a_bound() {
        let buses = Buses::default();
        buses.count_unanswered(Access::Pio, 0x80, true);
        (0..3).for_each(|_| buses.count_unanswered(Access::Pio, 0x80, false));
        let expected = Unanswered { reads: 1, writes: 3 };
        assert_eq!(buses.unanswered().0, [(Access::Pio, 0x80, expected)]);
        (0..2000).for_each(|address| buses.count_unanswered(Access::Mmio, address * 8, false));
        let (rows, others) = buses.unanswered();
        assert_eq!((rows.len(), others.writes), (1024, 977));
    }

    #[test]
    fn a_device_that_was_removed_answers_no_more() {
        let bus = Bus::default();
        add(&bus, 0x100, 8);
        assert!(bus.remove(0x104).is_err(), "not where it starts");
        bus.remove(0x100).unwrap();
        assert!(bus.find(&mut BusCache::default(), 0x100, 1).is_none());
        add(&bus, 0x104, 8);
    }

    #[test]
    fn a_repeated_access_ends_with_the_element_that_says_so() {
        #[derive(Debug)]
        struct StopsAt(u8);
        impl Device for StopsAt {
            fn read(&self, _offset: u64, data: &mut [u8]) -> Outcome {
                data.fill(0);
                Outcome::Stop
            }
            fn write(&self, _offset: u64, data: &[u8]) -> Outcome {
                if data == [self.0] { Outcome::Stop } else { Outcome::Continue }
            }
        }
        let mut data = [0xff; 4];
        assert_eq!(StopsAt(1).read_many(0, &mut data, 2), Outcome::Stop);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        assert_eq!(StopsAt(3).write_many(0, &[1, 2, 3, 4], 1), Outcome::Stop);
        assert_eq!(StopsAt(5).write_many(0, &[1, 2, 3, 4], 1), Outcome::Continue);
    }

    proptest! {
        #[test]
        fn find_agrees_with_the_ranges(ranges in prop::collection::vec((0u64..256, 1u64..32), 0..12),
                                       address in 0u64..300, length in 1usize..9) {
            let (claims, bus) = (Resources::default(), Bus::default());
            let mut added: Vec<(u64, u64)> = Vec::new();
            for (base, size) in ranges {
                let overlaps = added.iter().any(|(b, s)| base < b + s && *b < base + size);
                let refused = claim_and_add(&claims, &bus, base, size).is_err();
                prop_assert_eq!(refused, overlaps);
                if !overlaps {
                    added.push((base, size));
                }
            }
            let end = address + length as u64;
            let expected = added.iter().find(|(b, s)| *b <= address && end <= b + s);
            let mut copy = BusCache::default();
            let found = bus.find(&mut copy, address, length).map(|(_, offset)| offset);
            prop_assert_eq!(found, expected.map(|(b, _)| address - b));
        }
    }
}
