//! A machine that is to be again what a new fork of a snapshot is. From any thread.

use std::sync::atomic::Ordering;

use super::machine::Vmm;
use crate::error::Result;
use crate::limit::Limit;
use crate::snapshot::Snapshot;

impl Vmm {
    /// Bring the machine back to a snapshot, with everything that its runs have left on the host's
    /// side: nothing tells it from a new fork then. False where it cannot be: a run is in progress,
    /// somebody has asked for a stop, or its console has failed.
    ///
    /// # Errors
    /// As for [`Self::reset`].
    pub fn renew(&self, snapshot: &Snapshot, limit: &Limit<'_>) -> Result<bool> {
        // Relaxed: whoever ran it has told us since.
        let has_failed = self.has_failed.load(Ordering::Relaxed);
        if self.is_in_run() || has_failed || self.serial().take_failure().is_some() {
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
        Ok(true)
    }
}
