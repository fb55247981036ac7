//! Which of a reset's changes neither the processor nor KVM notices: those of the guest's page
//! tables. On the thread that resets, with all vCPUs stopped.

use super::snapshot::Snapshot;
use super::vcpu::special_of;
use crate::debug::Paging;
use crate::memory::GuestMemory;
use crate::memory::ranges::ByteRange;

/// More tables than this belong to a guest with several address spaces, some of which are not in
/// use: they cannot be found.
const MAX_TABLES: usize = 64;

/// Whether translations that the processor or KVM has cached may not agree with the page tables of
/// the snapshot, which `memory` holds again after these changes. Neither keeps them if a guest
/// loads another CR3.
pub(crate) fn may_be_stale(
    snapshot: &Snapshot,
    memory: &GuestMemory,
    changed: &[ByteRange],
) -> bool {
    if changed.is_empty() {
        return false;
    }
    let tables = snapshot.cache.tables.get_or_init(|| tables(snapshot, memory));
    let is_changed =
        |table: &u64| changed.iter().any(|(start, end)| (*start..*end).contains(table));
    tables.as_ref().is_none_or(|tables| tables.iter().any(is_changed))
}

/// The pages of all vCPUs' tables; `None` if they are too many.
fn tables(snapshot: &Snapshot, memory: &GuestMemory) -> Option<Vec<u64>> {
    let read = |at, length| match length {
        4 => memory.load::<u32>(at).ok().map(u64::from),
        _ => memory.load(at).ok(),
    };
    let of = |(number, records)| {
        let sregs = special_of(records, number)?;
        Paging::of(&sregs).tables(MAX_TABLES, read)
    };
    let all: Option<Vec<_>> =
        (0..).zip(&snapshot.vcpus).map(|(number, records)| of((number, records))).collect();
    all.map(|all| all.concat())
}
