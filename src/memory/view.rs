//! Direct access to a piece of guest memory, and the views that may be written at any time. Any
//! thread.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use vm_memory::MmapRegion;

use super::map::{CurrentMap, Map};
use super::mapping::Mapping;
use super::touched::has_tables;
use crate::process::ProcessTag;
use crate::sync::{Mutex, rank};

/// A piece of one mapping, which stays mapped until the view is dropped.
#[derive(Debug)]
pub struct View {
    mapping: Arc<Mapping>,
    offset: usize,
    length: usize,
}

impl View {
    pub(super) fn of(mapping: Arc<Mapping>, offset: usize, length: usize) -> Self {
        Self { mapping, offset, length }
    }

    /// Its address in this process.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.region().as_ptr().wrapping_add(self.offset)
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether its length is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether the host can write it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        is_writable(self.mapping.region())
    }
}

/// A view whose pages the log always includes, because writes through it cannot be detected.
#[derive(Debug)]
pub struct WritableView {
    view: View,
    process_tag: ProcessTag,
    views: Arc<WritableViews>,
    /// Weak: the machine's memory is released when the machine is closed.
    map: Weak<CurrentMap>,
    number: u64,
}

impl WritableView {
    pub(super) fn new(
        view: View,
        address: u64,
        map: &Arc<CurrentMap>,
        views: &Arc<WritableViews>,
    ) -> Self {
        let range = ViewRange { address, length: view.length as u64, mapping: view.mapping.host() };
        let number = views.add(range);
        let (map, views) = (Arc::downgrade(map), Arc::clone(views));
        Self { view, process_tag: ProcessTag::current(), views, map, number }
    }

    /// The view itself.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }
}

impl Drop for WritableView {
    fn drop(&mut self) {
        // In a forked child, the locks are as they were at the fork, perhaps held.
        if self.process_tag.is_forked_child() {
            return;
        }
        let Some(map) = self.map.upgrade() else { return };
        let map = Arc::clone(&map.read());
        // Log what was written since the log was last read. The next reader finds either this or
        // the view.
        let mut views = self.views.0.lock();
        let removed = views.all.remove(&self.number);
        views.has_touched |= removed.iter().any(ViewRange::has_tables);
        removed.iter().for_each(|range| range.note(&map));
    }
}

/// Where a writable view lies.
#[derive(Debug)]
struct ViewRange {
    address: u64,
    length: u64,
    /// The host address of its mapping, which no other mapping has while the view lives.
    mapping: u64,
}

impl ViewRange {
    fn has_tables(&self) -> bool {
        has_tables(self.address, self.length)
    }

    /// Log its pages, unless other memory is mapped there now.
    fn note(&self, map: &Map) {
        let mapped = map.find(self.address).filter(|mapped| mapped.mapping.host() == self.mapping);
        mapped.iter().for_each(|mapped| mapped.note_write(self.address, self.length));
    }
}

/// The writable views of one machine's memory.
#[derive(Debug, Default)]
pub(super) struct WritableViews(Mutex<ViewRanges, rank::WritableViews>);

/// By number.
#[derive(Debug, Default)]
struct ViewRanges {
    all: BTreeMap<u64, ViewRange>,
    added: u64,
    /// Whether one has ended through which the guest's first tables could be written.
    has_touched: bool,
}

impl WritableViews {
    fn add(&self, range: ViewRange) -> u64 {
        let mut views = self.0.lock();
        views.added += 1;
        let number = views.added;
        views.all.insert(number, range);
        number
    }

    /// Whether the guest's first tables can be written through a view, or could be since the last
    /// call.
    pub(super) fn take_touched(&self) -> bool {
        let mut views = self.0.lock();
        let has_touched = std::mem::take(&mut views.has_touched);
        has_touched || views.all.values().any(ViewRange::has_tables)
    }

    /// Log the pages of all.
    pub(super) fn note(&self, map: &Map) {
        self.0.lock().all.values().for_each(|range| range.note(map));
    }
}

/// Whether the host can write a mapping.
pub(super) fn is_writable(mapping: &MmapRegion) -> bool {
    mapping.prot() & libc::PROT_WRITE != 0
}
