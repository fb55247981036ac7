//! What a virtio device is to its transport. A device never sees a register, and finds its queues
//! through [`Queues`].

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use event_manager::{EventOps, Events};

use super::queues::Queues;
use crate::error::Result;

/// What the forks of a snapshot continue from, beyond bytes, such as the contents of a disk. A
/// snapshot in memory has it, a file does not.
pub type Frozen = Arc<dyn Any + Send + Sync>;

/// Read a part of a configuration space. What lies beyond it stays zero.
pub(super) fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let found = usize::try_from(offset).ok().and_then(|at| space.get(at..)).unwrap_or_default();
    data.iter_mut().zip(found).for_each(|(to, from)| *to = *from);
}

/// A device behind the transport. Its methods may be called from several threads at the same time;
/// it does its own locking. It does not call back into the transport with a lock held that one of
/// these methods takes.
pub trait VirtioDevice: Send + Sync + Debug {
    /// The device type (virtio 1.2, 5).
    fn device_type(&self) -> u32;

    /// The feature bits that it offers, without those of queues and transport.
    fn features(&self) -> u64 {
        0
    }

    /// Whether a driver may accept these features, which are offered, together: one may require
    /// another.
    fn accepts(&self, _features: u64) -> bool {
        true
    }

    /// The maximum size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Read the configuration space. What lies beyond it reads as zero, which `data` contains
    /// before the call. On a vCPU's thread.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    /// Write the configuration space. Ignored by default. On a vCPU's thread.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// The driver has set DRIVER_OK. Each queue is notified afterwards. On a vCPU's thread.
    fn activate(&self, _queues: &Arc<Queues>, _features: u64) {}

    /// The driver had done so before the snapshot that was just restored. What it has told the
    /// device since is in what [`Self::restore`] was given. On the thread that restores.
    fn reactivate(&self, queues: &Arc<Queues>, features: u64) {
        self.activate(queues, features);
    }

    /// The driver has reset the device. No access to the queues is in progress. Chains that the
    /// device still has are void: to complete them does nothing.
    fn reset(&self) {}

    /// Register the file descriptors that the device watches besides its queues' notifications.
    /// On the thread that connects the machine to its loop.
    fn init(&self, _ops: &mut EventOps<'_>) {}

    /// The driver has notified a queue, or may have. On the loop's thread. It must not block.
    fn process_queue(&self, queues: &Arc<Queues>, queue: usize, ops: &mut EventOps<'_>);

    /// Whether the program serves its queues, on the loop's thread but outside of the dispatch.
    fn is_served_by_program(&self) -> bool {
        false
    }

    /// A file descriptor that the device watches is ready. On the loop's thread. It must not block.
    fn process_event(&self, _queues: &Arc<Queues>, _events: Events, _ops: &mut EventOps<'_>) {}

    /// Stop changing what the guest can see, beyond what goes through the queues, which are closed
    /// to the device already. Any thread.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if this is impossible now.
    fn quiesce(&self) -> Result<()> {
        Ok(())
    }

    /// Undo a `quiesce`. Each queue is notified afterwards.
    fn resume(&self) {}

    /// The device's own state for a snapshot, without the queues. It is quiesced.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if it cannot be saved.
    fn save(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Restore what `save` returned. It is quiesced, and has been reset.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Snapshot`] if the bytes are not in the format of `save`.
    fn restore(&self, state: &[u8]) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        Err(crate::bytes::bad("virtio device", "this device has no state to restore"))
    }

    /// What the device was configured with, for a device like it in a fork or another process.
    fn spec(&self) -> Vec<u8> {
        Vec::new()
    }

    /// What forks continue from besides the bytes of `save`. It is quiesced.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if it cannot be frozen.
    fn freeze(&self) -> Result<Option<Frozen>> {
        Ok(None)
    }

    /// Go back to what this device, or the one that it was forked from, has frozen. It is quiesced.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if that is not possible.
    fn thaw(&self, _frozen: &Frozen) -> Result<()> {
        Ok(())
    }

    /// The machine is closed. No access to the queues is in progress, and none follows. End the
    /// device's threads, without waiting for the program's code.
    fn close(&self) {}

    /// The device itself, for the binding.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;

    /// Set what it counts to zero, and forget a failure.
    fn forget_counts(&self) {}

    /// The last failure of what is behind the device, for the user.
    fn failure(&self) -> Option<String> {
        None
    }
}
