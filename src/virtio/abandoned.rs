//! Chains that a device has dropped without completing them. The next access to the queues gives
//! them back to the driver. Any thread.

use vmm_sys_util::eventfd::EventFd;

use crate::sync::{Mutex, rank};

/// A dropped chain: its queue, its head and its epoch.
pub(super) type Dropped = (usize, u16, u64);

#[derive(Debug)]
pub(super) struct Abandoned {
    dropped: Mutex<Vec<Dropped>, rank::VirtioAbandoned>,
    /// Notifies the first queue, so that the loop's thread accesses the queues.
    notify: EventFd,
}

impl Abandoned {
    pub(super) fn new(notify: EventFd) -> Self {
        Self { dropped: Mutex::default(), notify }
    }

    pub(super) fn add(&self, queue: usize, head: u16, epoch: u64) {
        self.dropped.lock().push((queue, head, epoch));
        // Fails only if the counter is full: a notification is pending then.
        let _ = self.notify.write(1);
    }

    pub(super) fn take(&self) -> Vec<Dropped> {
        std::mem::take(&mut *self.dropped.lock())
    }
}
