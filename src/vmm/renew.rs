//! Resets a machine so that it can replace a new fork of a snapshot. From any thread.

use std::sync::atomic::Ordering;

use super::machine::Vmm;
use crate::error::Result;
use crate::limit::Limit;
use crate::snapshot::Snapshot;

impl Vmm {
    /// Reset the machine to a snapshot, and also everything on the host's side that its runs have
    /// changed, so that it equals a new fork. Returns false if this is impossible: a run is in
    /// progress, a stop is pending, or its console has failed.
    ///
    /// # Errors
    /// As for [`Self::reset`].
    pub fn renew(&self, snapshot: &Snapshot, limit: &Limit<'_>) -> Result<bool> {
        // Relaxed: the caller has synchronized with the thread that ran it.
        let has_failed = self.has_failed.load(Ordering::Relaxed);
        if self.is_in_run() || has_failed || self.take_failure().is_some() {
            return Ok(false);
        }
        let exit_handler = self.exit_handler()?;
        if exit_handler.is_kicked() || !exit_handler.keep_running() {
            return Ok(false);
        }
        self.reset(snapshot, limit, || ())?;
        self.vm()?.renew();
        self.router().buses.forget_unanswered();
        self.fixups().clear();
        for device in self.virtio()? {
            device.transport.queues().forget_counts();
            device.transport.device().forget_counts();
        }
        Ok(true)
    }
}
