//! The queues of one device, as the device finds them: they are open to it while the driver has
//! started it and the machine is not quiesced. Also its interrupts. Any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::abandoned::Abandoned;
use super::counts::Counts;
use super::queue::Queue;
use super::registers::{self, status};
use crate::devices::InterruptLine;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::GuestMemory;
use crate::sync::{Condvar, Mutex, rank};

/// Whether the device may access the queues.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// The features that the driver has accepted, once it has started the device.
    pub(super) active: Option<u64>,
    /// Whether the device needs a reset.
    has_failed: bool,
    /// How many have quiesced the device.
    holds: usize,
    /// Reasons of interrupts that came meanwhile, which are raised afterwards.
    deferred: u32,
    /// Accesses in progress.
    users: usize,
    /// How often the device was started or reset. What was taken in another epoch is void.
    pub(super) epoch: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Queues {
    name: String,
    pub(super) memory: GuestMemory,
    line: Option<Box<dyn InterruptLine>>,
    pub(super) status: AtomicU8,
    pub(super) interrupt_status: AtomicU32,
    pub(super) config_generation: AtomicU32,
    pub(super) gate: Mutex<Gate, rank::VirtioGate>,
    changed: Condvar,
    pub(super) all: Vec<Mutex<Queue, rank::VirtioQueue>>,
    /// One bit for each queue that the driver has stopped alone.
    pub(super) stopped: AtomicU64,
    /// The notifications of each queue.
    pub(super) notify: Vec<EventFd>,
    pub(super) abandoned: Arc<Abandoned>,
    /// What it counts.
    pub counts: Arc<Counts>,
    failure: Mutex<Option<String>, rank::VirtioFailure>,
}

impl Queues {
    /// The queues of a device of this name, with these maximum sizes.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub(super) fn new(
        name: &str,
        sizes: &[u16],
        memory: GuestMemory,
        line: Option<Box<dyn InterruptLine>>,
    ) -> Result<Self> {
        let event = || {
            EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))
        };
        let queue = |size: &u16| Queue::new(*size).map(Mutex::new);
        let notify: Vec<EventFd> = sizes.iter().map(|_| event()).collect::<Result<_>>()?;
        let first = match notify.first() {
            Some(first) => {
                first.try_clone().map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?
            }
            None => event()?,
        };
        Ok(Self {
            name: name.to_owned(),
            memory,
            line,
            status: AtomicU8::new(0),
            interrupt_status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            gate: Mutex::default(),
            changed: Condvar::new(),
            all: sizes.iter().map(queue).collect::<Result<_>>()?,
            stopped: AtomicU64::new(0),
            notify,
            abandoned: Arc::new(Abandoned::new(first)),
            counts: Arc::default(),
            failure: Mutex::default(),
        })
    }

    /// Changes with each start and reset. A chain of another epoch is void.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.gate.lock().epoch
    }

    /// The descriptor of a queue's notifications.
    #[must_use]
    pub fn notification(&self, queue: usize) -> Option<&EventFd> {
        self.notify.get(queue)
    }

    /// The name of the device.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Begin an access: the features and the epoch of the device. See [`Queues::access`].
    pub(super) fn enter(&self) -> Option<(u64, u64)> {
        let mut gate = self.gate.lock();
        if gate.holds > 0 { None } else { Self::pass(&mut gate) }
    }

    /// See [`Queues::access_after`].
    pub(super) fn enter_after(&self, epoch: u64) -> Option<(u64, u64)> {
        let mut gate = self.gate.lock();
        while gate.holds > 0 && gate.epoch == epoch {
            self.changed.wait(&mut gate);
        }
        if gate.epoch == epoch { Self::pass(&mut gate) } else { None }
    }

    fn pass(gate: &mut Gate) -> Option<(u64, u64)> {
        let features = gate.active.filter(|_| !gate.has_failed)?;
        gate.users += 1;
        Some((features, gate.epoch))
    }

    /// End an access.
    pub(super) fn leave(&self) {
        let mut gate = self.gate.lock();
        gate.users -= 1;
        if gate.users == 0 {
            self.changed.notify_all();
        }
    }

    fn wait_for_users(&self, gate: &mut crate::sync::MutexGuard<'_, Gate, rank::VirtioGate>) {
        while gate.users > 0 {
            self.changed.wait(gate);
        }
    }

    /// The driver has started the device with these features.
    pub(super) fn start(&self, features: u64) {
        let mut gate = self.gate.lock();
        (gate.active, gate.has_failed) = (Some(features), false);
        gate.epoch += 1;
        // Relaxed: the gate orders it before each access.
        self.stopped.store(0, Ordering::Relaxed);
    }

    /// End the device's access to the queues, and wait for accesses in progress. What the device
    /// still has is void.
    pub(super) fn stop(&self) {
        let mut gate = self.gate.lock();
        (gate.active, gate.has_failed, gate.deferred) = (None, false, 0);
        gate.epoch += 1;
        self.changed.notify_all();
        self.wait_for_users(&mut gate);
    }

    /// Close the queues to the device, and wait for accesses in progress.
    pub(super) fn hold(&self) {
        let mut gate = self.gate.lock();
        gate.holds += 1;
        self.wait_for_users(&mut gate);
    }

    /// The driver has stopped one queue. This waits for accesses in progress.
    pub(super) fn stop_queue(&self, queue: u32) {
        let at = usize::try_from(queue).ok();
        let Some(found) = at.and_then(|at| self.all.get(at)) else { return };
        self.hold();
        found.lock().stop();
        // Relaxed: the gate orders it before each access.
        self.stopped.fetch_or(1 << (queue & 63), Ordering::Relaxed);
        self.release();
    }

    /// Undo [`Self::hold`]. Each queue is notified: the device has missed what came meanwhile.
    pub(super) fn release(&self) {
        let mut gate = self.gate.lock();
        gate.holds = gate.holds.saturating_sub(1);
        if gate.holds > 0 {
            return;
        }
        let deferred = std::mem::take(&mut gate.deferred);
        self.changed.notify_all();
        drop(gate);
        self.interrupt_unless_quiesced(deferred);
        self.notify_all();
    }

    /// Notify each queue, as the driver does.
    pub(super) fn notify_all(&self) {
        // Fails only if the counter is full: a notification is pending then.
        self.notify.iter().for_each(|event| drop(event.write(1)));
    }

    /// Notify a queue, as the driver does: the loop's thread then processes it.
    pub fn notify(&self, queue: usize) {
        self.notify.get(queue).iter().for_each(|event| drop(event.write(1)));
    }

    /// The features that the driver has accepted; None while it has not started the device.
    #[must_use]
    pub fn features(&self) -> Option<u64> {
        self.gate.lock().active
    }

    /// The device's configuration space has changed: tell the driver.
    pub fn config_changed(&self) {
        // Release: a driver that reads the new generation reads the new configuration.
        self.config_generation.fetch_add(1, Ordering::Release);
        self.interrupt_unless_quiesced(registers::CONFIGURATION_CHANGE);
    }

    /// The device cannot continue until the driver resets it: DEVICE_NEEDS_RESET.
    pub fn fail(&self, reason: impl Into<String>) {
        let reason = reason.into();
        let mut gate = self.gate.lock();
        let is_first = !std::mem::replace(&mut gate.has_failed, true);
        drop(gate);
        if is_first {
            *self.failure.lock() = Some(reason);
            self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
            self.interrupt_unless_quiesced(registers::CONFIGURATION_CHANGE);
        }
    }

    /// Why the device needed a reset, most recently.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// Set the counts to zero, and forget the failure of an earlier guest.
    pub(crate) fn forget_counts(&self) {
        self.counts.clear();
        if !self.gate.lock().has_failed {
            *self.failure.lock() = None;
        }
    }

    /// Interrupt the guest for reasons that are not those of an access, or remember them while the
    /// machine is quiesced. So a snapshot has both the register and the pending edge, or neither of
    /// them and the reasons.
    pub(super) fn interrupt_unless_quiesced(&self, reasons: u32) {
        let mut gate = self.gate.lock();
        if gate.active.is_none() || reasons == 0 {
            return;
        }
        if gate.holds > 0 {
            gate.deferred |= reasons;
            return;
        }
        // Whatever quiesces the device waits for this as for an access.
        gate.users += 1;
        drop(gate);
        self.interrupt(reasons);
        self.leave();
    }

    /// The reasons of interrupts that the guest has not acknowledged, and of those that wait for
    /// the machine.
    pub(super) fn interrupts(&self) -> (u32, u32) {
        let deferred = self.gate.lock().deferred;
        (self.interrupt_status.load(Ordering::Acquire), deferred)
    }

    /// Interrupt the guest, for these reasons. In an access.
    pub(super) fn interrupt(&self, reasons: u32) {
        // AcqRel: the guest reads what was written before.
        self.interrupt_status.fetch_or(reasons, Ordering::AcqRel);
        self.counts.interrupts.fetch_add(1, Ordering::Relaxed);
        if let Some(line) = &self.line {
            // An edge. It is pending when this returns.
            line.set(true);
            line.set(false);
        }
    }

    /// Whether the rings of every queue that the driver has set up are usable.
    pub(super) fn are_valid(&self) -> bool {
        let memory = self.memory.moment();
        self.all.iter().all(|queue| {
            let queue = queue.lock();
            !queue.ring.ready() || queue.is_valid(&memory)
        })
    }
}
