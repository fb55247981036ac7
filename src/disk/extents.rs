//! Where an image has its data in its file, as far as that was looked up: a request within a known
//! extent needs no lookup, and goes between the file and the driver's buffers at once. Any thread.

use crate::sync::{Mutex, rank};

/// How much of a disk one lookup is for.
pub(super) const WINDOW: u64 = 8 << 20;
/// The windows whose extents are kept, one each. Others take the same places.
const WINDOWS: usize = 256;

/// Consecutive bytes of a disk that are consecutive in the file, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Where it begins on the disk.
    pub(super) start: u64,
    /// Where it ends on the disk.
    pub(super) end: u64,
    /// Where it begins in the file.
    pub(super) at: u64,
}

impl Extent {
    /// Where a range of the disk is in the file.
    pub(super) fn place(self, offset: u64, length: u64) -> Option<u64> {
        let end = offset.checked_add(length)?;
        let is_inside = self.start <= offset && end <= self.end;
        if is_inside { self.at.checked_add(offset - self.start) } else { None }
    }

    /// Both, if one continues the other or they overlap.
    fn with(self, other: Self) -> Option<Self> {
        let (first, last) = if self.start <= other.start { (self, other) } else { (other, self) };
        let is_one = first.place(last.start, 0) == Some(last.at);
        is_one.then(|| Self { end: first.end.max(last.end), ..first })
    }
}

#[derive(Debug, Default)]
struct Known {
    windows: Vec<Extent>,
    changes: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Extents(Mutex<Known, rank::DiskExtents>);

/// What was known at a lookup. What is found is kept unless something has changed since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket(u64);

impl Extents {
    /// Where a range of the disk is in the file, if that is known.
    pub(super) fn place(&self, offset: u64, length: u64) -> Result<u64, Ticket> {
        let known = self.0.lock();
        let extent = known.windows.get(window(offset)).copied().unwrap_or_default();
        extent.place(offset, length).ok_or(Ticket(known.changes))
    }

    /// Keep what a lookup has found within one window.
    pub(super) fn add(&self, ticket: Ticket, extent: Extent) {
        let mut known = self.0.lock();
        if known.changes != ticket.0 {
            return;
        }
        if known.windows.is_empty() {
            known.windows.resize(WINDOWS, Extent::default());
        }
        if let Some(place) = known.windows.get_mut(window(extent.start)) {
            *place = place.with(extent).unwrap_or(extent);
        }
    }

    /// Extents are not where they were. Called before and after the change: a lookup may have been
    /// in progress.
    pub(super) fn forget(&self) {
        let mut known = self.0.lock();
        known.windows.clear();
        known.changes += 1;
    }
}

fn window(offset: u64) -> usize {
    usize::try_from(offset / WINDOW).unwrap_or(0) % WINDOWS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64, at: u64) -> Extent {
        Extent { start, end, at }
    }

    fn known(extents: &Extents, offset: u64, length: u64) -> Option<u64> {
        extents.place(offset, length).ok()
    }

    #[test]
    fn a_range_is_known_once_it_was_found() {
        let extents = Extents::default();
        let ticket = extents.place(100, 10).unwrap_err();
        extents.add(ticket, extent(100, 200, 5000));
        assert_eq!(known(&extents, 150, 50), Some(5050));
        assert_eq!(known(&extents, 150, 51), None);
        assert_eq!(known(&extents, 99, 5), None);
        assert_eq!(known(&extents, u64::MAX, 5), None);
        // One that continues it.
        extents.add(ticket, extent(50, 100, 4950));
        assert_eq!(known(&extents, 50, 150), Some(4950));
        // One that does not.
        extents.add(ticket, extent(200, 300, 0));
        assert_eq!((known(&extents, 50, 1), known(&extents, 250, 1)), (None, Some(50)));
        // One of another window that takes the same place.
        let far = WINDOW * WINDOWS as u64;
        extents.add(ticket, extent(far, far + 10, 0));
        assert_eq!((known(&extents, 250, 1), known(&extents, far, 10)), (None, Some(0)));
    }

    #[test]
    fn what_was_looked_up_before_a_change_is_not_kept() {
        let extents = Extents::default();
        let ticket = extents.place(0, 1).unwrap_err();
        extents.forget();
        extents.add(ticket, extent(0, 10, 0));
        assert_eq!(known(&extents, 0, 1), None);
        let ticket = extents.place(0, 1).unwrap_err();
        extents.add(ticket, extent(0, 10, 0));
        assert_eq!(known(&extents, 0, 1), Some(0));
        extents.forget();
        assert_eq!(known(&extents, 0, 1), None);
    }
}
