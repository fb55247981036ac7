//! The owners of a machine's guest-physical addresses, ports and interrupt lines. Ranges are
//! claimed before boot data is written, because boot data may name them. Any thread may claim;
//! nothing is called with the lock held.

use std::fmt;
use std::ops::RangeInclusive;

use crate::sync::{Mutex, rank};

/// The kind of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResourceKind {
    /// Guest-physical addresses with memory.
    Memory,
    /// Guest-physical addresses of a device.
    Mmio,
    /// Ports.
    Pio,
    /// Lines of the interrupt controllers (global system interrupts).
    Gsi,
}

impl ResourceKind {
    /// Its name in Python.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Mmio => "mmio",
            Self::Pio => "pio",
            Self::Gsi => "gsi",
        }
    }

    /// Memory and memory-mapped devices share one space of addresses.
    fn shares_space_with(self, other: Self) -> bool {
        let space = |kind| if kind == Self::Mmio { Self::Memory } else { kind };
        space(self) == space(other)
    }
}

/// A range and its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The kind.
    pub kind: ResourceKind,
    /// The first address, port or line.
    pub start: u64,
    /// The number of addresses, ports or lines.
    pub length: u64,
    /// The owner.
    pub name: String,
    /// Whether others may use it too, such as an irqfd's line or an ioeventfd's address.
    pub is_shared: bool,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {:#x} to {:#x}", self.name, self.start, self.last())
    }
}

impl Resource {
    fn last(&self) -> u64 {
        self.start.saturating_add(self.length.saturating_sub(1))
    }

    fn overlaps(&self, kind: ResourceKind, start: u64, last: u64) -> bool {
        self.kind.shares_space_with(kind) && start <= self.last() && self.start <= last
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Resources {
    /// Sorted by kind and start. Ranges that are not shared do not overlap.
    claims: Mutex<Vec<Resource>, rank::Resources>,
}

impl Resources {
    /// Claim a range exclusively.
    ///
    /// # Errors
    /// The claim that it would overlap.
    pub fn claim(
        &self,
        kind: ResourceKind,
        (start, length): (u64, u64),
        name: &str,
    ) -> Result<(), Resource> {
        let name = name.to_owned();
        let claim = Resource { kind, start, length, name, is_shared: false };
        let mut claims = self.claims.lock();
        let last = claim.last();
        if let Some(other) = owners(&claims).find(|other| other.overlaps(kind, start, last)) {
            return Err(other.clone());
        }
        insert(&mut claims, claim);
        Ok(())
    }

    /// Add a shared use of a range.
    pub fn share(&self, kind: ResourceKind, (start, length): (u64, u64), name: &str) {
        let name = name.to_owned();
        insert(&mut self.claims.lock(), Resource { kind, start, length, name, is_shared: true });
    }

    /// Claim the first free range of this length within limits, at a multiple of `align`. Returns
    /// its start, or None if there is no room. Shared uses count as taken.
    pub fn allocate(
        &self,
        kind: ResourceKind,
        within: RangeInclusive<u64>,
        (length, align): (u64, u64),
        name: &str,
    ) -> Option<u64> {
        let mut claims = self.claims.lock();
        let mut start = within.start().checked_next_multiple_of(align)?;
        loop {
            let last = start.checked_add(length.checked_sub(1)?)?;
            if last > *within.end() {
                return None;
            }
            match claims.iter().find(|claim| claim.overlaps(kind, start, last)) {
                Some(other) => {
                    start = other.last().checked_add(1)?.checked_next_multiple_of(align)?
                }
                None => break,
            }
        }
        let name = name.to_owned();
        insert(&mut claims, Resource { kind, start, length, name, is_shared: false });
        Some(start)
    }

    /// The owners of a range's parts.
    #[must_use]
    pub fn owners_in(&self, kind: ResourceKind, (start, length): (u64, u64)) -> Vec<Resource> {
        let last = start.saturating_add(length.saturating_sub(1));
        let claims = self.claims.lock();
        owners(&claims).filter(|claim| claim.overlaps(kind, start, last)).cloned().collect()
    }

    /// Release a claim. Does nothing if no claim starts there.
    pub fn release(&self, kind: ResourceKind, start: u64) {
        let mut claims = self.claims.lock();
        let at = claims.iter().position(|c| (c.kind, c.start, c.is_shared) == (kind, start, false));
        at.map(|at| claims.remove(at));
    }

    /// Release a shared use.
    pub fn release_shared(&self, kind: ResourceKind, start: u64, name: &str) {
        let mut claims = self.claims.lock();
        let is_it = |c: &Resource| {
            (c.kind, c.start, c.is_shared, c.name.as_str()) == (kind, start, true, name)
        };
        let at = claims.iter().position(is_it);
        at.map(|at| claims.remove(at));
    }

    /// All claims, by kind and start.
    #[must_use]
    pub fn all(&self) -> Vec<Resource> {
        self.claims.lock().clone()
    }
}

fn owners(claims: &[Resource]) -> impl Iterator<Item = &Resource> {
    claims.iter().filter(|claim| !claim.is_shared)
}

fn insert(claims: &mut Vec<Resource>, claim: Resource) {
    let at = claims.partition_point(|other| (other.kind, other.start) <= (claim.kind, claim.start));
    claims.insert(at, claim);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_has_one_owner_and_the_refusal_names_it() {
        let resources = Resources::default();
        resources.claim(ResourceKind::Memory, (0, 0x1000), "RAM").unwrap();
        let owner = resources.claim(ResourceKind::Mmio, (0xfff, 2), "a device").unwrap_err();
        assert_eq!((owner.name.as_str(), owner.kind), ("RAM", ResourceKind::Memory));
        resources.claim(ResourceKind::Pio, (0xfff, 2), "a device").unwrap();
        resources.claim(ResourceKind::Mmio, (0x1000, u64::MAX), "the rest").unwrap();
        resources.release(ResourceKind::Memory, 0);
        resources.claim(ResourceKind::Mmio, (0xfff, 1), "a device").unwrap();
        let names: Vec<_> = resources.all().into_iter().map(|claim| claim.name).collect();
        assert_eq!(names, ["a device", "the rest", "a device"]);
    }

    #[test]
    fn a_shared_use_is_listed_and_excludes_nothing_but_an_allocation() {
        let resources = Resources::default();
        resources.share(ResourceKind::Gsi, (5, 1), "irqfd");
        resources.share(ResourceKind::Gsi, (5, 1), "irqfd");
        resources.claim(ResourceKind::Gsi, (5, 1), "a device").unwrap();
        resources.release(ResourceKind::Gsi, 5);
        assert_eq!(resources.allocate(ResourceKind::Gsi, 5..=23, (1, 1), "virtio"), Some(6));
        resources.release_shared(ResourceKind::Gsi, 5, "irqfd");
        assert_eq!(resources.all().len(), 2);
    }

    proptest! {
        #[test]
        fn what_is_allocated_overlaps_nothing_and_a_refusal_means_that_there_is_no_room(
            wanted in prop::collection::vec((1u64..40, 0u32..5, any::<bool>()), 0..40),
        ) {
            let resources = Resources::default();
            for (length, shift, is_kept) in wanted {
                let align = 1 << shift;
                let before = resources.all();
                let free = |start: u64| {
                    !before.iter().any(|c| c.overlaps(ResourceKind::Mmio, start, start + length - 1))
                };
                let at = resources.allocate(ResourceKind::Mmio, 0x10..=0xff, (length, align), "it");
                let first = (0x10..=0x100 - length).filter(|s| s % align == 0).find(|s| free(*s));
                prop_assert_eq!(at, first);
                if let (Some(at), false) = (at, is_kept) {
                    resources.release(ResourceKind::Mmio, at);
                    prop_assert_eq!(resources.all(), before);
                }
            }
        }

        #[test]
        fn no_range_panics(start in any::<u64>(), length in 1..=u64::MAX, align in 0u32..64) {
            let resources = Resources::default();
            let _ = resources.claim(ResourceKind::Mmio, (start, length), "one");
            let _ = resources.claim(ResourceKind::Memory, (length, start.max(1)), "other");
            let _ = resources.allocate(ResourceKind::Mmio, start..=u64::MAX, (length, 1 << align), "more");
        }
    }
}
