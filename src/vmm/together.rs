//! Takes snapshots of several machines at one instant. Any thread but a vCPU's.

use super::machine::Vmm;
use crate::error::Result;
use crate::limit::Limit;
use crate::snapshot::Snapshot;

impl Vmm {
    /// Capture several machines at one instant: all are held still before the first is captured.
    /// `meanwhile` captures what is between them. Running machines continue afterwards, and after
    /// an error.
    ///
    /// # Errors
    /// As for [`Self::snapshot`], for the first machine that has one.
    pub fn snapshot_together<T>(
        machines: &[&Self],
        limit: &Limit<'_>,
        meanwhile: impl FnOnce() -> T,
    ) -> Result<(Vec<Snapshot>, T)> {
        let vms = machines.iter().map(|machine| machine.vm()).collect::<Result<Vec<_>>>()?;
        let hold = vms.iter().map(|vm| vm.quiesce("snapshot", limit));
        let _held = hold.collect::<Result<Vec<_>>>()?;
        let between = meanwhile();
        let snapshots = machines.iter().map(|machine| machine.snapshot(limit));
        Ok((snapshots.collect::<Result<_>>()?, between))
    }
}
