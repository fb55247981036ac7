//! The contents of all slots: frozen for a snapshot, and restored by a reset. The caller keeps the
//! guest stopped; host threads may write at any time.

use super::image::MemoryRange;
use super::ram::Ram;
use super::ranges::ByteRange;
use super::slots::Slots;
use super::table::Entry;
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;

impl Slots {
    /// Freeze the contents of every slot.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if any memory is shared. If the process is out of descriptors or
    /// memory.
    pub(crate) fn freeze(&self) -> Result<Vec<MemoryRange>> {
        hop!();
        let mut table = self.table.lock();
        if let Some(entry) = table.entries.iter().find(|entry| entry.ram.is_none()) {
            let at = format!("memory at {:#x}", entry.slot.start);
            let detail = "it is shared: other processes may write it at any time";
            let error = Error::new(ErrorKind::State, at, detail);
            return Err(error.hint("remove that slot before the snapshot, and add it to each fork"));
        }
        let mut all = Vec::new();
        for Entry { slot, ram, .. } in &mut table.entries {
            let image = ram.as_mut().map(Ram::freeze).transpose()?;
            let range =
                |image| MemoryRange { start: slot.start, read_only: slot.backing.read_only, image };
            all.extend(image.map(range));
        }
        Ok(all)
    }

    /// Check that these ranges can be restored now.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the machine's slots have changed.
    pub(crate) fn check(&self, ranges: &[MemoryRange]) -> Result<()> {
        self.table.lock().check(ranges)
    }

    /// Check once more, call `begin`, and restore each range to the slot at its address. Returns
    /// the ranges that were changed, by guest-physical address.
    ///
    /// # Errors
    /// As for `check`, and if a file behind the ranges has been changed. Nothing is changed then.
    /// If the process is out of memory or mappings: part of the machine's memory is restored then.
    pub(crate) fn reset(
        &self,
        ranges: &[MemoryRange],
        begin: impl FnOnce(),
    ) -> Result<Vec<ByteRange>> {
        let mut table = self.table.lock();
        table.check(ranges)?;
        ranges.iter().try_for_each(|range| range.image.check())?;
        begin();
        let mut changed = Vec::new();
        let own = table.entries.iter_mut().filter(|entry| entry.ram.is_some());
        for (entry, range) in own.zip(ranges) {
            let Some(ram) = &mut entry.ram else { continue };
            for (from, to) in ram.reset(&range.image)? {
                changed.push((range.start + from, range.start + to));
                entry.mapped().note_write(range.start + from, to - from);
            }
        }
        Ok(changed)
    }
}
