//! The ioeventfds of a device's notifications. Until the driver has notified a queue a few times,
//! its notifications are exits: a machine that runs for a moment, such as a fork, does not pay for
//! the registration. vCPU threads call it.

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::Doorbell;

/// A queue gets its ioeventfd after this many exits.
const EXITS: u32 = 16;

#[derive(Debug)]
pub(super) struct Doorbells {
    /// Registers an eventfd for a value that is written to the notification register.
    doorbell: Option<Box<dyn Doorbell>>,
    address: u64,
    exits: Vec<AtomicU32>,
}

impl Doorbells {
    /// For the queues of a device, whose notification register is here.
    pub(super) fn new(doorbell: Option<Box<dyn Doorbell>>, address: u64, queues: usize) -> Self {
        Self { doorbell, address, exits: (0..queues).map(|_| AtomicU32::new(0)).collect() }
    }

    /// The driver has notified this queue by an exit.
    pub(super) fn rung(&self, queue: usize, event: &EventFd) {
        let Some(exits) = self.exits.get(queue) else { return };
        // Relaxed: exactly one thread sees the limit.
        if exits.fetch_add(1, Ordering::Relaxed) != EXITS {
            return;
        }
        if let (Some(doorbell), Ok(value)) = (&self.doorbell, u32::try_from(queue)) {
            doorbell.connect(event, self.address, value);
        }
    }
}
